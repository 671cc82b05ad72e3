"""The time that a trace takes on an ideal engine: the yardstick that measured runs are divided by.

    python -m benchmarks.roofline --model llama-3-8b --adapters 200 --ranks 16

The ideal engine keeps every request that fits in memory running, decodes one token of each in every
step, fills the rest of a step with prompt tokens, and overlaps nothing it could not overlap. A step
costs the model's cuBLAS products for its tokens in a CUDA graph, the KV bytes of its sequences and
the bytes of its adapters at the best measured rate of a paged read. It is a yardstick, not a proven
bound: prompts' attention and activations are left out. Products and rates were measured on one
NVIDIA H200 (bf16, torch 2.11, CUDA 13.0): up to 512 rows those below, above them what
`benchmarks/products.py` found.
"""

import argparse
import bisect
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results_file import RESULTS
from benchmarks.trace import NO_ADAPTER, TraceRequest, make_trace

BANDWIDTH = 4.12e12  # bytes/s of paged KV reads
ITEM_BYTES = 2
PRODUCTS = RESULTS / "products.json"


@dataclass(frozen=True, slots=True)
class IdealModel:
    name: str
    layers: int
    hidden: int
    kv_width: int
    gemm_ms: dict[int, float]  # of a step's products, by rows, all of which sample

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
    "llama-2-7b": IdealModel(
        name="llama-2-7b",
        layers=32,
        hidden=4096,
        kv_width=4096,
        gemm_ms={
            1: 3.686,
            8: 3.727,
            16: 3.771,
            32: 3.744,
            64: 3.834,
            128: 4.151,
            192: 5.101,
            256: 5.822,
            384: 7.997,
            512: 11.285,
        },
    ),
    "llama-3-8b": IdealModel(
        name="llama-3-8b",
        layers=32,
        hidden=4096,
        kv_width=1024,
        gemm_ms={
            1: 4.028,
            8: 4.042,
            16: 4.086,
            32: 4.164,
            64: 4.281,
            128: 4.667,
            192: 5.76,
            256: 6.952,
            384: 9.571,
            512: 13.911,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class LargeProducts:
    """Milliseconds of a large step's products, by rows of the step and by rows that sample."""

    body_ms: Mapping[int, float]
    head_ms: Mapping[int, float]

    def ms(self, tokens: int, sampled: int) -> float:
        return _between(self.body_ms, tokens) + _between(self.head_ms, sampled)


@functools.cache
def large_products(path: Path, model: str) -> LargeProducts:
    """What a result file of `benchmarks/products.py` says of `model`."""
    found = json.loads(path.read_text())["metrics"][model]
    parts = {part: {int(rows): ms for rows, ms in times.items()} for part, times in found.items()}
    return LargeProducts(parts["body_ms"], parts["head_ms"])


def gemm_ms(model: IdealModel, tokens: int, sampled: int) -> float:
    """Milliseconds of the products of a step of `tokens` rows, `sampled` of which need logits."""
    most = max(model.gemm_ms)
    if tokens <= most:
        return _between(model.gemm_ms, tokens)
    return max(model.gemm_ms[most], large_products(PRODUCTS, model.name).ms(tokens, sampled))


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


@dataclass(slots=True)
class _Running:
    cached: int
    left: int
    adapter: int
    reserved: int


def ideal_seconds(
    model: IdealModel,
    trace: Sequence[TraceRequest],
    ranks: Sequence[int],
    *,
    pool_bytes: float = 108 * 2**30,
    step_tokens: int = 8192,
    max_running: int = 512,
) -> float:
    """Seconds from the first step to the end of the last request; arrivals are ignored."""
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
        total_ms += gemm_ms(model, tokens, len(running)) + read_bytes / BANDWIDTH * 1e3
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
    arguments = parser.parse_args()
    trace = make_trace(
        requests=arguments.requests, adapters=arguments.adapters, alpha=arguments.alpha
    )
    seconds = ideal_seconds(MODELS[arguments.model], trace, arguments.ranks)
    print(json.dumps(vars(arguments) | {"ideal_req_per_s": round(len(trace) / seconds, 2)}))


if __name__ == "__main__":
    main()
