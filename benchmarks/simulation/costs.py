"""What a worker's step and an adapter's load take: the cost model of the simulator.

A step computes `rows` tokens, of which `sampled` draw one, reads the KV cache of the sequences that
decode and the weights of each distinct adapter. `MeasuredCosts` reckons with what was measured on a
GPU; `LinearCosts` with coefficients that were fitted to recorded runs.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.card import find_card
from benchmarks.roofline import MODELS
from lorry.worker.buckets import bucket_sizes


class StepCosts(Protocol):
    def step_s(self, *, rows: int, sampled: int, kv_tokens: int, rank_sum: int) -> float:
        """Seconds of a step; `rank_sum` is that of its distinct adapters."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCosts:
    """Coefficients in milliseconds."""

    step_ms: float
    row_ms: float  # of a token that is computed
    kv_token_ms: float  # of a cached token that is read
    rank_ms: float  # of an adapter's rank

    def step_s(self, *, rows: int, sampled: int, kv_tokens: int, rank_sum: int) -> float:
        return 1e-3 * (
            self.step_ms
            + self.row_ms * rows
            + self.kv_token_ms * kv_tokens
            + self.rank_ms * rank_sum
        )


class MeasuredCosts:
    """The products of a step at its bucket of rows, the bytes that it reads at the measured rate of
    a copy, and what else a step was seen to take: `other_ms`, and `lora_ms` with any adapter."""

    def __init__(
        self, *, device: str, model: str, step_tokens: int, other_ms: float, lora_ms: float
    ) -> None:
        card = find_card(device)
        assert card is not None, f"nothing was measured on {device}"
        products, shape = card.products[model], MODELS[model]
        self._body_ms = _by_rows(
            step_tokens, [(size, products.ms(size, 0)) for size in bucket_sizes(step_tokens)]
        )
        self._head_ms = [products.ms(1, n) - products.ms(1, 0) for n in range(step_tokens + 1)]
        self._ms_per_kv_token = shape.kv_bytes / card.bytes_per_s * 1e3
        self._ms_per_rank = shape.adapter_bytes_per_rank / card.bytes_per_s * 1e3
        self._other_ms, self._lora_ms = other_ms, lora_ms

    def step_s(self, *, rows: int, sampled: int, kv_tokens: int, rank_sum: int) -> float:
        milliseconds = self._body_ms[rows] + self._head_ms[sampled] + self._other_ms
        milliseconds += kv_tokens * self._ms_per_kv_token
        if rank_sum:
            milliseconds += self._lora_ms + rank_sum * self._ms_per_rank
        return milliseconds * 1e-3


def _by_rows(most: int, sizes: Sequence[tuple[int, float]]) -> list[float]:
    """The time of each number of rows: that of the next size."""
    ends = [size for size, _ in sizes]
    return [sizes[bisect_left(ends, rows)][1] for rows in range(most + 1)]
