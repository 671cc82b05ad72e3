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
    )
}


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
) -> float:
    """Seconds from the first step to the end of the last request; arrivals are ignored."""
    products = card.products[model.name]
    waiting = list(reversed(trace))
    running: list[_Running] = []
    total_ms = 0.0
    while waiting or running:
        adapters = {r.adapter for r in running} - {NO_ADAPTER}
        adapter_bytes = sum(_adapter_bytes(model, adapter, ranks) for adapter in adapters)
        reserved = sum(r.reserved for r in running)
        tokens, cached = len(running), sum(r.cached for r in running)
        while waiting and tokens < step_tokens and len(running) < max_running:
            request = waiting[-1]
            length = request.prompt_tokens + request.output_tokens
            needed = (reserved + length) * model.kv_bytes + adapter_bytes
            if needed > pool_bytes or request.prompt_tokens > step_tokens - tokens:
                break
            waiting.pop()
            running.append(
                _Running(request.prompt_tokens, request.output_tokens, request.adapter, length)
            )
            reserved += length
            tokens += request.prompt_tokens
            if request.adapter not in adapters | {NO_ADAPTER}:
                adapters.add(request.adapter)
                adapter_bytes += _adapter_bytes(model, request.adapter, ranks)
        read_bytes = cached * model.kv_bytes + adapter_bytes
        total_ms += products.ms(tokens, len(running))
        total_ms += read_bytes / card.bytes_per_s * 1e3
        for one in running:
            one.cached += 1
            one.left -= 1
        running = [one for one in running if one.left > 0]
    return total_ms / 1e3


def _adapter_bytes(model: IdealModel, adapter: int, ranks: Sequence[int]) -> int:
    return model.adapter_bytes_per_rank * ranks[adapter % len(ranks)]


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
    if card is None:
        parser.error(f"no results of products and kernels on {arguments.device}: run them there")
    spec = TraceSpec(
        requests=arguments.requests, adapters=arguments.adapters, alpha=arguments.alpha
    )
    trace = make_trace(spec)
    pool_bytes = arguments.pool_gib * GIB
    seconds = ideal_seconds(
        card, MODELS[arguments.model], trace, arguments.ranks, pool_bytes=pool_bytes
    )
    print(json.dumps(vars(arguments) | {"ideal_req_per_s": round(len(trace) / seconds, 2)}))


if __name__ == "__main__":
    main()
