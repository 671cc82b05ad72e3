"""The start of a worker is measured with the real processes, on the CPU with the demo's model."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.figures import figures
from tests.support.command import REPO, child_environment
from tests.support.processes import DEMO_MODEL


def run(directory: Path, *worker_options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.start", "--model", str(DEMO_MODEL)]
    options = ["--device", "cpu", "--directory", str(directory), "--", *worker_options]
    return subprocess.run(
        [*command, *options],
        cwd=REPO,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_cold_and_a_warm_start_are_measured_up_to_the_first_token(tmp_path: Path) -> None:
    assert run(tmp_path, "--pool-pages=100").returncode == 0
    [path] = tmp_path.iterdir()
    metrics = json.loads(path.read_text())["metrics"]
    for name in ("cold", "warm"):
        seconds = [metrics[f"{name}_{what}_s"] for what in ("listening", "ready", "first_token")]
        assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert "A worker (model) has its first token" in figures(tmp_path)


def test_a_worker_that_does_not_start_fails_the_benchmark(tmp_path: Path) -> None:
    done = run(tmp_path, f"--pool-bytes={1 << 50}")
    assert done.returncode != 0
    assert "out of memory; lower pool_bytes" in done.stderr
    assert not list(tmp_path.iterdir())
