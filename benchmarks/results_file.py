"""One JSON file for each run, in the form that README and docs are made from."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "grpcio", "protobuf", "tokenizers", "crc32c")


def write_result(
    name: str,
    *,
    benchmark: str,
    device: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    directory: Path = RESULTS,
    commit: str | None = None,
) -> Path:
    """Write ``NAME.json``, with a GPU's short name after it, and print it as one line."""
    result = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": commit or checked_out_commit(),
        "command": " ".join(["python -m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "config": dict(config),
        "metrics": dict(metrics),
    }
    path = directory / f"{name}{_card(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
    return path


def host_name() -> str:
    """The device of what is measured without a GPU."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def spread(values: Sequence[float], *, digits: int) -> dict[str, float]:
    """Median and range, rounded."""
    ends = {"median": median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in ends.items()}


def _card(device: str) -> str:
    """``-h200`` of "NVIDIA H200", so that one card's results do not replace another's."""
    is_gpu = device.startswith("NVIDIA ")
    return f"-{device.split()[1].lower()}" if is_gpu else ""


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def checked_out_commit(directory: Path | None = None) -> str:
    """Of `directory`, else of the working one; "unknown" where it came without its history."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=directory,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
