"""Hostile adapters for the store's parsers, within a bound of memory.

    python -m benchmarks.store_fuzz

Half of the cases are safetensors files and half are configs, all drawn from one seed. Whatever is
not good must be refused as such: any other exception, or memory beyond the bound, ends the run.
"""

import argparse
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
from hypothesis import HealthCheck, given, seed, settings

from benchmarks.results_file import host_name, write_result
from tests.support.hostile_adapters import check_config, check_file, configs, files

MORE_BYTES = 1 << 30  # of address space than at the start


def fuzz(
    cases: Any, check: Callable[[Any], bool], *, count: int, number: int
) -> tuple[int, int, float]:
    """Cases, how many of them were good, and seconds."""
    seen: Counter[bool] = Counter()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases)
    def run(case: Any) -> None:
        seen[check(case)] += 1

    start_s = time.monotonic()
    run()
    return seen.total(), seen[True], time.monotonic() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    process = psutil.Process()
    before = process.memory_info()
    limit = before.vms + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    metrics: dict[str, Any] = {}
    for name, cases, check in (
        ("files", files(), check_file),
        ("configs", configs(), check_config),
    ):
        tried, good, seconds = fuzz(cases, check, count=arguments.cases // 2, number=arguments.seed)
        metrics[name] = {"cases": tried, "good": good, "seconds": round(seconds, 1)}
        print(f"{name:8s} {tried} cases, {good} good, {tried - good} refused, {seconds:.0f} s")
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    metrics["grown_mib"] = round((peak_bytes - before.rss) / 2**20, 1)
    write_result(
        "store-fuzz",
        benchmark="store_fuzz",
        device=host_name(),
        config={"cases": arguments.cases, "seed": arguments.seed},
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
