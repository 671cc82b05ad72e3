"""Every shipped launch setting becomes sm_90 machine code here, where no GPU is needed."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.sm90 import SHARED_LIMIT_BYTES

MAX_REGISTERS = 255


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "tests.support.shipped_settings"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    report: list[dict[str, Any]] = json.loads(done.stdout)
    return report


def test_every_kernel_of_the_engine_is_compiled(kernels):
    assert {kernel["kernel"] for kernel in kernels} == {
        "attention_kernel",
        "_best_kernel",
        "_draw_best_kernel",
        "_edit_kernel",
        "_expand_kernel",
        "_expand_rope_kernel",
        "_logprobs_kernel",
        "_merge_kernel",
        "_penalize_kernel",
        "_plan_kernel",
        "_product_kernel",
        "_rank_kernel",
        "_rank_sum_kernel",
        "_rms_norm_kernel",
        "_rope_write_kv_kernel",
        "_scores_kernel",
        "_shrink_kernel",
        "_small_kernel",
        "_split_kernel",
        "_swiglu_kernel",
        "_truncation_kernel",
    }


def test_no_shipped_setting_spills_registers(kernels):
    assert not [kernel for kernel in kernels if kernel["local_bytes"]]
    assert max(kernel["registers"] for kernel in kernels) <= MAX_REGISTERS


def test_every_kernel_is_launched_early_and_waits_before_it_touches_memory(kernels):
    assert not [kernel for kernel in kernels if not kernel["is_dependent"]]
    assert not [kernel for kernel in kernels if not kernel["waits_first"]]


def test_every_shipped_setting_fits_in_shared_memory(kernels):
    assert max(kernel["shared_bytes"] for kernel in kernels) <= SHARED_LIMIT_BYTES
