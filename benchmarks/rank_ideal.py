"""The ideal engine of `benchmarks/roofline.py` on several GPUs: one rank's share of everything.

A step costs the rank's products, two sums of its rows over the ranks in each layer and one of the
embedding, as `benchmarks/collectives.py` measured both, and the rank's part of KV and adapters at
the rate of a large copy. Sums over more GPUs than were measured are projected: latency grows with
the logarithm of their number, and a ring moves ``2 (N - 1) / N`` of the bytes over each link.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.building import CONFIGS
from benchmarks.card import Card, Products, products_of
from benchmarks.roofline import ITEM_BYTES, IdealModel, ideal_seconds
from lorry.client.bench.trace import TraceSpec, make_trace
from lorry.rpc.base_model import BaseModel, read_base_model


@dataclass(frozen=True, slots=True)
class RankModel(IdealModel):
    """What of a model is one rank's, adapters replicated."""

    size: int

    @property
    def kv_bytes(self) -> int:
        """Of one cached token."""
        return self.layers * 2 * math.ceil(self.kv_width / self.size) * ITEM_BYTES

    @property
    def adapter_bytes_per_rank(self) -> int:
        """A of q, k and v and B of o whole, the others split; of each unit of an adapter's rank."""
        split = 2 * self.hidden + 2 * self.kv_width
        return self.layers * ITEM_BYTES * (4 * self.hidden + split // self.size)


def rank_model(base_model: BaseModel, size: int) -> RankModel:
    geometry = base_model.geometry
    return RankModel(
        name=base_model.directory.name,
        layers=geometry.layers,
        hidden=geometry.hidden,
        kv_width=geometry.kv_heads * geometry.head_dim,
        size=size,
    )


def rank_card(measured: Mapping[str, Any], model: RankModel) -> Card | None:
    """One of `model.size` equal cards, as a result of `benchmarks.collectives` tells; None if it
    does not have the rank's products."""
    metrics = measured["metrics"]
    shares = metrics["products"].get(str(model.size), {})
    if model.name not in shares:
        return None
    products = products_of(shares[model.name])
    sum_us = _sums(metrics["sums"])
    body_ms = {
        rows: ms + sums_ms(sum_us, model, rows, measured["config"]["tensor_parallel"])
        for rows, ms in products.body_ms.items()
    }
    return Card(
        measured["device"],
        metrics["copy_bytes_per_s"],
        {model.name: Products(body_ms, products.head_ms)},
    )


def sums_ms(sum_us: Mapping[int, float], model: RankModel, rows: int, measured_size: int) -> float:
    """All sums of a step over the ranks."""
    if model.size == 1:
        return 0.0
    num_bytes, latency_us = rows * model.hidden * ITEM_BYTES, min(sum_us.values())
    moved_us = max(_between(sum_us, num_bytes) - latency_us, 0.0)
    share, measured_share = ((size - 1) / size for size in (model.size, measured_size))
    growth = math.log2(model.size) / math.log2(measured_size)
    one_us = latency_us * growth + moved_us * share / measured_share
    return (2 * model.layers + 1) * one_us / 1e3


@dataclass(frozen=True, slots=True)
class RankIdeal:
    """What the ideal engine makes of the steps and the trace of `benchmarks.tensor_parallel`."""

    card: Card
    model: RankModel
    ranks: Sequence[int]  # of the adapters, in turn

    def step_ms(self, batch: int, context: int, adapters: int) -> float:
        """Of one token of each sequence."""
        ranks = [self.ranks[number % len(self.ranks)] for number in range(adapters)]
        model = self.model
        read = batch * context * model.kv_bytes + sum(ranks) * model.adapter_bytes_per_rank
        products = self.card.products[model.name]
        return products.ms(batch, batch) + read / self.card.bytes_per_s * 1e3

    def req_per_s(self, spec: TraceSpec, pool_bytes: float) -> float:
        """Of a trace whose requests are all there at once; each GPU has such a pool."""
        trace = make_trace(spec)
        seconds = ideal_seconds(self.card, self.model, trace, self.ranks, pool_bytes=pool_bytes)
        return len(trace) / seconds


def rank_ideal(
    measured: Mapping[str, Any], model: str, size: int, ranks: Sequence[int]
) -> RankIdeal | None:
    """Of `size` GPUs; None where `measured`, of `benchmarks.collectives`, lacks their products."""
    of_rank = rank_model(read_base_model(CONFIGS / model), size)
    card = rank_card(measured, of_rank)
    return None if card is None else RankIdeal(card, of_rank, ranks)


def _sums(sums: Mapping[str, Mapping[str, float]]) -> dict[int, float]:
    """The faster way for each number of bytes."""
    fastest: dict[int, float] = {}
    for times in sums.values():
        for num_bytes, us in times.items():
            fastest[int(num_bytes)] = min(us, fastest.get(int(num_bytes), math.inf))
    return fastest


def _between(sum_us: Mapping[int, float], num_bytes: int) -> float:
    sizes = sorted(sum_us)
    if num_bytes >= sizes[-1]:
        return sum_us[sizes[-1]] * num_bytes / sizes[-1]
    place = bisect.bisect_left(sizes, num_bytes)
    high, low = sizes[place], sizes[max(place - 1, 0)]
    part = (num_bytes - low) / (high - low) if high > low else 0.0
    return sum_us[low] * (1 - part) + sum_us[high] * part
