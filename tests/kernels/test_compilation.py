"""Kernels that were compiled ahead are not compiled again by their launches."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, "-m", "tests.support.compiled_ahead"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_compiling_ahead_launches_nothing(report: dict[str, Any]) -> None:
    assert report["launched_ahead"] == 0


def test_every_launched_kernel_was_compiled_ahead(report: dict[str, Any]) -> None:
    assert report["later"] == []
    assert set(report["ahead"]) == set(report["launched"])
    assert len(report["ahead"]) == 8
