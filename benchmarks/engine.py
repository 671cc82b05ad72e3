"""A trace through the very engine that the worker serves with.

    python -m benchmarks.engine --model llama-3-8b --adapters 200 --ranks 16

All requests are submitted at once, or with `--arrivals` each at its time. Weights are random
normal, prompts are distinct, and each adapter has bytes, a version and pages of its own; page
images are in host memory before the clock starts, loads to the GPU are inside it. The scheduler
does not know output lengths: max_tokens is what the context allows, and a request is cancelled when
it has the asked number of tokens.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.building import GIB, build, device_name, engine_parser, model_of, pool_gib
from benchmarks.card import find_card
from benchmarks.driver import Driver
from benchmarks.random_images import TARGETS, RandomImages, image_directory
from benchmarks.results_file import RESULTS, write_result
from benchmarks.roofline import ideal_model, ideal_seconds
from benchmarks.trace_run import TraceRun
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace
from lorry.worker.engine import Engine


def distinct_prompts(trace: Sequence[TraceRequest], vocabulary: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, vocabulary, request.prompt_tokens).tolist() for request in trace]


def measure(arguments: argparse.Namespace, adapters: int, engine: Engine) -> dict[str, Any]:
    """Run the trace `arguments.runs` times; the metrics are those of the median run."""
    base_model, layout = model_of(arguments)
    spec = TraceSpec(
        requests=arguments.requests,
        adapters=adapters,
        alpha=arguments.alpha,
        rate=arguments.rate,
        cv=arguments.cv,
        seed=arguments.seed,
    )
    trace = make_trace(spec)
    runs = []
    with image_directory() as directory:
        images = RandomImages(directory, layout, arguments.ranks, adapters)
        for number in range(arguments.runs):
            prompts = distinct_prompts(trace, base_model.vocab_size, number)
            run = TraceRun(
                engine, images, trace, first=time.time_ns(), at_arrivals=arguments.arrivals
            )
            runs.append(run.run(prompts, engine.scheduler.limits.max_context_tokens))
            print(f"run {number}: {_line(runs[-1])}", flush=True)
            Driver(engine, images, []).evict_all()
    runs.sort(key=lambda run: run["req_per_s"])
    metrics = runs[len(runs) // 2] | {"req_per_s_of_runs": [run["req_per_s"] for run in runs]}
    return metrics | _ideal(arguments, trace, pool_gib(engine, layout))


def _ideal(
    arguments: argparse.Namespace, trace: Sequence[TraceRequest], size_gib: float
) -> dict[str, float]:
    """The yardstick, where the card's rates are known by now."""
    card = find_card(device_name(arguments.device), (RESULTS, arguments.directory))
    model = ideal_model(card, arguments.model)
    if card is None or model is None:
        return {}
    seconds = ideal_seconds(card, model, trace, arguments.ranks, pool_bytes=size_gib * GIB)
    return {"ideal_req_per_s": len(trace) / seconds}


def _line(metrics: dict[str, Any]) -> str:
    ttft_s, gap_s = metrics["ttft_s"], metrics["token_gap_s"]
    return (
        f"{metrics['req_per_s']:.2f} req/s, first token {ttft_s['p50']:.3f} s (p50) "
        f"{ttft_s['p99']:.3f} s (p99), token gap {gap_s['p50'] * 1e3:.1f} ms (p50) "
        f"{gap_s['p99'] * 1e3:.1f} ms (p99)"
    )


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.add_argument("--requests", type=int, default=1000)
    result.add_argument(
        "--adapters", type=int, nargs="+", default=[200], help="numbers of; 0: the base model only"
    )
    result.add_argument("--alpha", type=float, default=1.0, help="0 is uniform, 1 is Zipf")
    result.add_argument("--seed", type=int, default=42, help="of the trace")
    result.add_argument("--runs", type=int, default=3)
    result.add_argument("--arrivals", action="store_true", help="submit each request at its time")
    result.add_argument("--rate", type=float, default=2.0, help="requests a second, on average")
    result.add_argument("--cv", type=float, default=1.0, help="of the gaps; 1 is Poisson")
    return result


def result_config(arguments: argparse.Namespace, adapters: int, size_gib: float) -> dict[str, Any]:
    return {
        "model": arguments.model,
        "ranks": arguments.ranks,
        "adapters": adapters,
        "requests": arguments.requests,
        "trace_seed": arguments.seed,
        "alpha": arguments.alpha,
        "rate": arguments.rate if arguments.arrivals else None,
        "cv": arguments.cv if arguments.arrivals else None,
        "tensor_parallel": 1,
        "step_tokens": arguments.step_tokens,
        "max_running": arguments.max_running,
        "pool_gib": round(size_gib, 2),
        "dtype": arguments.dtype,
        "modules": list(TARGETS),
    }


def result_name(arguments: argparse.Namespace, adapters: int) -> str:
    ranks = "-".join(map(str, arguments.ranks))
    name = f"engine-{Path(arguments.model).name}-{adapters}-r{ranks}-{arguments.alpha:g}"
    return name + (f"-rate{arguments.rate:g}-cv{arguments.cv:g}" if arguments.arrivals else "")


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    base_model, layout = model_of(arguments)
    engine, _ = build(arguments, base_model, layout)
    for adapters in arguments.adapters:
        write_result(
            result_name(arguments, adapters),
            benchmark="engine",
            device=device_name(arguments.device),
            config=result_config(arguments, adapters, pool_gib(engine, layout)),
            metrics=measure(arguments, adapters, engine),
            directory=arguments.directory,
            commit=arguments.commit,
        )


if __name__ == "__main__":
    main()
