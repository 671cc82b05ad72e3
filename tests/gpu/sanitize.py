"""Run tiny cases of every kernel under compute-sanitizer: python -m tests.gpu.sanitize [TOOL ...]

Tools are memcheck (the default), racecheck, initcheck and synccheck. Where the machine has no
compute-sanitizer, or its GPU refuses it, that is said and is no failure.
"""

import os
import shutil
import subprocess
import sys
from itertools import product

import torch

from lorry.kernels.activation import swiglu, swiglu_reference
from lorry.kernels.launch_settings import (
    LORA,
    decode_setting,
    lora_setting,
    prefill_setting,
    small_setting,
)
from lorry.kernels.norm import add_rms_norm, add_rms_norm_reference
from lorry.kernels.rope import QkNorm, cos_sin_table, rope_write_kv
from lorry.kernels.sampling import sample
from tests.support.adjustment_cases import check_adjustments, mixed_adjustments, mixed_tables
from tests.support.kernel_cases import (
    LAYER,
    MIXED_ADAPTERS,
    TOLERANCE,
    layout_of,
    poisoned_pool,
    relative_error,
    store_adapters,
    store_sequences,
)
from tests.support.kernel_checks import check_attention, check_lora
from tests.support.rotation_checks import check_expand_rope
from tests.support.sampling_cases import (
    check_logprobs,
    check_truncation,
    mixed_logits,
    mixed_num_top,
    mixed_truncation,
)

CASES = "--cases"
TIMEOUT_S = 150.0
FOUND = 9  # what compute-sanitizer is told to exit with
REFUSALS = ("Device not supported", "Unable to find", "not supported on")


def attention(device: torch.device, dtype: torch.dtype) -> None:
    layout = layout_of("demo", dtype)
    sequences = store_sequences([(17, 1), (33, 5), (150, 1), (70, 40)], layout, device, padding=3)
    for form, window in product((decode_setting, prefill_setting), (None, 20)):
        check_attention(sequences, layout.geometry.heads, form(dtype, 2), window)
    few = store_sequences([(33, 2), (150, 1)], layout, device, padding=1)
    for window in (None, 20):
        check_attention(few, layout.geometry.heads, small_setting(dtype, 2), window)


def lora(device: torch.device, dtype: torch.dtype) -> None:
    pool, tables = store_adapters(MIXED_ADAPTERS[:4], layout_of("demo", dtype), device)
    for rows in LORA:
        setting, slots = lora_setting(dtype, rows), [0, 0, 0, 1, -1, 2, 3, 3]
        check_lora(slots, pool, tables, setting, groups=(0, 1))
        check_expand_rope(slots, pool, tables, setting)


def rows(device: torch.device, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 7, 200).to(device, dtype)
    weight, out = torch.randn(200).to(x), torch.empty_like(x)
    normed, _ = add_rms_norm_reference(x, residual, weight, 1e-5)
    add_rms_norm(x, residual, weight, 1e-5, out)
    assert relative_error(out, normed) < TOLERANCE[dtype]
    swiglu(x, residual, out)
    assert relative_error(out, swiglu_reference(x, residual)) < TOLERANCE[dtype]
    qkv = torch.randn(7, 8, 32).to(device, dtype)
    q, k, v = qkv.split([4, 2, 2], dim=1)
    position, page = torch.arange(7, device=device), torch.arange(7, device=device)
    pool = poisoned_pool(8, layout_of("demo", dtype), device)
    table, head = cos_sin_table(100, 32, 1e4).to(device), torch.ones(32).to(x)
    for norm in (None, QkNorm(head, head, 1e-5)):
        rope_write_kv(q, k, v, table, position, page, pool, LAYER, norm)


def draws(device: torch.device, dtype: torch.dtype) -> None:
    rows = torch.arange(6, device=device)
    logits = mixed_logits(len(rows), 5000, dtype, device)
    truncation = mixed_truncation(len(rows), device)
    threshold = check_truncation(logits, truncation)
    tables = mixed_tables(len(rows), logits.shape[1], device)
    check_adjustments(logits, tables, mixed_adjustments(len(rows), device))
    token = torch.full_like(rows, -1)
    sample(logits, truncation.temperature_T, rows, rows, token, threshold)
    assert ((token >= 0) & (token < 5000)).all()
    check_logprobs(logits, token, mixed_num_top(len(rows), device))


def run_cases() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    for case in (attention, lora, rows, draws):
        case(device, torch.bfloat16 if on_gpu else torch.float16)
        print(f"{case.__name__}: results are right", flush=True)


def check(tool: str) -> int:
    """Run the cases under `tool`; its exit code, 0 where it cannot run here."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        print("compute-sanitizer is not installed here")
        return 0
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += [sys.executable, "-m", "tests.gpu.sanitize", CASES]
    # Every tensor gets memory of its own, so that none hides an access beyond another's end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    output = done.stdout + done.stderr
    print(f"{tool}: exit {done.returncode}\n{output[-3000:]}", flush=True)
    if done.returncode and any(refusal in output for refusal in REFUSALS):
        print(f"{tool} cannot run on this machine's GPU")
        return 0
    return done.returncode


def main() -> int:
    arguments = sys.argv[1:]
    if arguments == [CASES]:
        run_cases()
        return 0
    return max([check(tool) for tool in arguments or ["memcheck"]])


if __name__ == "__main__":
    sys.exit(main())
