"""The time that a trace takes on an ideal engine: the yardstick that measured runs are divided by.

    python -m benchmarks.roofline --model llama-3-8b --adapters 200 --ranks 16

The ideal engine keeps every request that fits in memory running, decodes one token of each in every
step, fills the rest of a step with prompt tokens, and overlaps nothing it could not overlap. A step
costs the model's cuBLAS products for its tokens in a CUDA graph, and the KV bytes of its sequences
and the bytes of its adapters at the rate of a large copy, both as measured on the card
(`benchmarks/card.py`). It is a yardstick, not a proven bound: prompts' attention and activations
are left out.
"""

import argparse
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.card import Card, find_card
from lorry.client.bench.trace import NO_ADAPTER, TraceRequest, TraceSpec, make_trace

ITEM_BYTES = 2
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class IdealModel:
    name: str
    layers: int
    hidden: int
    kv_width: int

    @property
    def kv_bytes(self) -> int:
        """Of one cached token."""
        return self.layers * 2 * self.kv_width * ITEM_BYTES

    @property
    def adapter_bytes_per_rank(self) -> int:
        """Of q, k, v and o."""
        widths = 2 * (self.hidden + self.hidden) + 2 * (self.hidden + self.kv_width)
        return self.layers * ITEM_BYTES * widths


MODELS = {
    model.name: model
    for model in (
        IdealModel(name="llama-2-7b", layers=32, hidden=4096, kv_width=4096),
        IdealModel(name="llama-3-8b", layers=32, hidden=4096, kv_width=1024),
        IdealModel(name="llama-2-13b", layers=40, hidden=5120, kv_width=5120),
    )
}


def ideal_model(card: Card | None, name: str) -> IdealModel | None:
    """The model, if the products that its steps take have been measured on the card."""
    return MODELS.get(name) if card is not None and name in card.products else None


@dataclass(slots=True)
class _Running:
    cached: int
    left: int
    adapter: int
    reserved: int


def ideal_seconds(
    card: Card,
    model: IdealModel,
    trace: Sequence[TraceRequest],
    ranks: Sequence[int],
    *,
    pool_bytes: float,
    step_tokens: int = 8192,
    max_running: int = 512,
    at_arrivals: bool = False,
) -> float:
    """Seconds from the first step to the end of the last request.

    All requests are there at once, or with `at_arrivals` each from its time on.
    """
    engine = _IdealEngine(card, model, ranks, pool_bytes, step_tokens, max_running)
    waiting = deque(trace)
    while waiting or engine.running:
        if at_arrivals and not engine.running:
            engine.now_ms = max(engine.now_ms, waiting[0].arrival_s * 1e3)
        engine.step(waiting, engine.now_ms / 1e3 if at_arrivals else math.inf)
    return engine.now_ms / 1e3


class _IdealEngine:
    def __init__(
        self,
        card: Card,
        model: IdealModel,
        ranks: Sequence[int],
        pool_bytes: float,
        step_tokens: int,
        max_running: int,
    ) -> None:
        self._card, self._model, self._ranks = card, model, ranks
        self._pool_bytes = pool_bytes
        self._step_tokens, self._max_running = step_tokens, max_running
        self.running: list[_Running] = []
        self.now_ms = 0.0

    def step(self, waiting: deque[TraceRequest], arrived_s: float) -> None:
        """Admit what has arrived by then and has room, and compute a token of every request."""
        running = self.running
        adapters = {r.adapter for r in running} - {NO_ADAPTER}
        adapter_bytes = sum(map(self._adapter_bytes, adapters))
        reserved = sum(r.reserved for r in running)
        tokens, cached = len(running), sum(r.cached for r in running)
        while waiting and tokens < self._step_tokens and len(running) < self._max_running:
            request = waiting[0]
            length = request.prompt_tokens + request.output_tokens
            needed = (reserved + length) * self._model.kv_bytes + adapter_bytes
            has_room = needed <= self._pool_bytes
            has_room &= request.prompt_tokens <= self._step_tokens - tokens
            if not has_room or request.arrival_s > arrived_s:
                break
            waiting.popleft()
            running.append(
                _Running(request.prompt_tokens, request.output_tokens, request.adapter, length)
            )
            reserved += length
            tokens += request.prompt_tokens
            if request.adapter not in adapters | {NO_ADAPTER}:
                adapters.add(request.adapter)
                adapter_bytes += self._adapter_bytes(request.adapter)
        self._compute(tokens, cached * self._model.kv_bytes + adapter_bytes)

    def _compute(self, tokens: int, read_bytes: int) -> None:
        self.now_ms += self._card.products[self._model.name].ms(tokens, len(self.running))
        self.now_ms += read_bytes / self._card.bytes_per_s * 1e3
        for one in self.running:
            one.cached += 1
            one.left -= 1
        self.running = [one for one in self.running if one.left > 0]

    def _adapter_bytes(self, adapter: int) -> int:
        return self._model.adapter_bytes_per_rank * self._ranks[adapter % len(self._ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-2-7b")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--device", default="NVIDIA H200", help="a card with committed results")
    parser.add_argument("--pool-gib", type=float, default=108.0)
    arguments = parser.parse_args()
    card = find_card(arguments.device)
    model = ideal_model(card, arguments.model)
    if card is None or model is None:
        parser.error(
            f"no results of products of {arguments.model} and of kernels on {arguments.device}: "
            "run them there"
        )
    spec = TraceSpec(
        requests=arguments.requests, adapters=arguments.adapters, alpha=arguments.alpha
    )
    trace = make_trace(spec)
    pool_bytes = arguments.pool_gib * GIB
    seconds = ideal_seconds(card, model, trace, arguments.ranks, pool_bytes=pool_bytes)
    print(json.dumps(vars(arguments) | {"ideal_req_per_s": round(len(trace) / seconds, 2)}))


if __name__ == "__main__":
    main()
