"""Hostile adapters for the store's parsers, within a bound of memory.

    python -m benchmarks.store_fuzz

Half of the cases are safetensors files and half are configs, all drawn from one seed: good ones of
which bytes, fields or entries are replaced. Whatever is not good must be refused as such: any other
exception, or memory beyond the bound, ends the run. `tests/adapter_store/test_fuzz.py` searches
with hypothesis for smaller ones.
"""

import argparse
import json
import random
import resource
import struct
import time
from collections.abc import Callable
from typing import Any

import psutil

from benchmarks.results_file import host_name, write_result
from tests.support.hostile_adapters import (
    CONFIG,
    FIELDS,
    FILE,
    HEADER,
    HEADER_BYTES,
    check_config,
    check_file,
)

MORE_BYTES = 1 << 29  # of address space than at the start
LEAVES = [
    *(None, True, False, -1, 0, 1, 8, 256, 257, 2**31, 2**48, 2**64, 10**400, 0.5, 1e400, -1e308),
    *("", "BF16", "F32", "I64", "q_proj", "lm_head", "all-linear", "\0", "\ud800", "LORA", "none"),
    *("(", "[", ".*", r".*\.q_proj", "(?P<idx>x)", "(?i)Q", r"\1", "a{9999}", "q_proj" * 50),
]


class Hostile:
    """Draws cases."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def tree(self, depth: int = 3) -> Any:
        kind = self._random.randrange(6) if depth else 0
        size = self._random.randrange(4)
        if kind == 4:
            return [self.tree(depth - 1) for _ in range(size)]
        if kind == 5:
            return {str(self._leaf()): self.tree(depth - 1) for _ in range(size)}
        return self._leaf()

    def file(self) -> bytes:
        kind = self._random.randrange(5)
        if kind == 0:
            return FILE[: self._random.randrange(len(FILE))]
        if kind == 1:
            return (
                struct.pack("<Q", self._random.getrandbits(self._random.randrange(65))) + FILE[8:]
            )
        if kind == 2:
            damaged = bytearray(FILE)
            for _ in range(self._random.randrange(1, 9)):
                damaged[self._random.randrange(8 + HEADER_BYTES)] = self._random.randrange(256)
            return bytes(damaged)
        header = json.dumps(self._header() if kind == 3 else self.tree()).encode()
        return struct.pack("<Q", len(header)) + header + FILE[8 + HEADER_BYTES :]

    def config(self) -> str:
        config = dict(CONFIG)
        for _ in range(self._random.randrange(1, 4)):
            config[self._random.choice(FIELDS)] = self.tree(2)
        return json.dumps(config)

    def _leaf(self) -> Any:
        return self._random.choice(LEAVES)

    def _header(self) -> dict[str, Any]:
        header = {name: dict(entry) for name, entry in HEADER.items()}
        names = sorted(header)
        for _ in range(self._random.randrange(1, 4)):
            field = self._random.choice(["dtype", "shape", "data_offsets", "more"])
            header[self._random.choice(names)][field] = self.tree(2)
        return header


def fuzz(draw: Callable[[], Any], check: Callable[[Any], bool], count: int) -> dict[str, float]:
    start_s = time.monotonic()
    good = sum(check(draw()) for _ in range(count))
    return {"cases": count, "good": good, "seconds": round(time.monotonic() - start_s, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    hostile, before = Hostile(arguments.seed), psutil.Process().memory_info()
    limit = before.vms + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    metrics: dict[str, Any] = {
        "files": fuzz(hostile.file, check_file, arguments.cases // 2),
        "configs": fuzz(hostile.config, check_config, arguments.cases // 2),
    }
    for name, found in metrics.items():
        print(f"{name:8s} {found['cases']} cases, {found['good']} good, {found['seconds']} s")
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
