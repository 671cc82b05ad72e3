"""What a GPU does at its best, as measured on it: what the ideal engine reckons with.

A card is known by two committed results of the same device: `benchmarks/products.py` tells what a
step's matrix products take, `benchmarks/kernels.py` how fast memory is copied.
"""

import bisect
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS


@dataclass(frozen=True, slots=True)
class Products:
    """Milliseconds of a step's products, by rows of the step and by rows that sample."""

    body_ms: Mapping[int, float]
    head_ms: Mapping[int, float]

    def ms(self, tokens: int, sampled: int) -> float:
        """Of a step of `tokens` rows, `sampled` of which need logits."""
        return _between(self.body_ms, tokens) + _between(self.head_ms, sampled)


@dataclass(frozen=True, slots=True)
class Card:
    device: str
    bytes_per_s: float  # of a large copy, read and written
    products: Mapping[str, Products]  # by model


@functools.cache
def find_card(device: str, directories: Sequence[Path] = (RESULTS,)) -> Card | None:
    """The card of this name; None if its products or its copies have not been measured."""
    measured = {}
    for benchmark in ("products", "kernels"):
        found = _results(benchmark, device, directories)
        if not found:
            return None
        measured[benchmark] = max(found, key=lambda result: str(result["date"]))["metrics"]
    return Card(
        device,
        measured["kernels"]["copy_bytes_per_s"],
        {model: products_of(times) for model, times in measured["products"].items()},
    )


def products_of(times: Mapping[str, Mapping[str, float]]) -> Products:
    """What a result of `benchmarks/products.py` says of one model."""
    parts = {part: {int(rows): ms for rows, ms in of.items()} for part, of in times.items()}
    return Products(parts["body_ms"], parts["head_ms"])


def _results(benchmark: str, device: str, directories: Sequence[Path]) -> list[dict[str, Any]]:
    paths = [path for directory in directories for path in sorted(directory.glob("*.json"))]
    found = [json.loads(path.read_text()) for path in paths if path.stem.startswith(benchmark)]
    return [r for r in found if r["benchmark"] == benchmark and r["device"] == device]


def _between(measured: Mapping[int, float], rows: int) -> float:
    """The time of `rows` rows: between two that were measured, or at the rate of the most."""
    sizes = sorted(measured)
    if rows > sizes[-1]:
        return measured[sizes[-1]] * rows / sizes[-1]
    high = sizes[bisect.bisect_left(sizes, rows)]
    if high == rows or high == sizes[0]:
        return measured[high]
    low = sizes[bisect.bisect_left(sizes, rows) - 1]
    part = (rows - low) / (high - low)
    return measured[low] * (1 - part) + measured[high] * part
