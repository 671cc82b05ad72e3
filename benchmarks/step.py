"""The time of a decode step by batch, context, adapters and rank, beside the ideal engine's.

    python -m benchmarks.step --model llama-3-8b --batch 64 --context 1024 --adapters 64 --ranks 16

The engine is the very one that the worker serves with. Requests are submitted at once and decode
until each has passed the context; steps in which all of them decode around it are timed, and the
ideal step is that of `benchmarks/roofline.py`.
"""

import argparse
import itertools
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import build, device_name, engine_parser, evict_all, model_of
from benchmarks.random_images import RandomImages, image_directory
from benchmarks.results_file import write_result
from benchmarks.roofline import BANDWIDTH, MODELS, gemm_ms
from lorry.worker import messages as m
from lorry.worker.engine import Engine

MEASURED_STEPS = 64
WARM_UP_STEPS = 8


def measure_case(
    engine: Engine, images: RandomImages, batch: int, context: int, adapters: int, vocabulary: int
) -> dict[str, float]:
    """Median milliseconds of a step, and how much of it the host computed."""
    random = np.random.default_rng(0)
    prompt = context - MEASURED_STEPS // 2
    first = time.time_ns()
    versions = {images.version(adapter): adapter for adapter in range(adapters)}
    for index in range(batch):
        version = images.version(index % adapters) if adapters else b""
        engine.handle(
            [
                m.Submit(
                    request=first + index,
                    tenant="default",
                    version=version,
                    token_ids=random.integers(3, vocabulary, prompt).tolist(),
                    generated_tokens=0,
                    max_tokens=4 * MEASURED_STEPS,
                    min_tokens=0,
                    stop_token_ids=[],
                    temperature=0.0,
                    seed=index,
                    remaining_s=None,
                )
            ]
        )
    _until_all_decode(engine, images, versions, batch)
    host_s, times_s = engine.host_s, []
    for _ in range(MEASURED_STEPS):
        started_s = time.perf_counter()
        engine.step()
        engine.take_events()
        times_s.append(time.perf_counter() - started_s)
    engine.handle([m.Cancel(list(range(first, first + batch)))])
    host_ms = (engine.host_s - host_s) / MEASURED_STEPS * 1e3
    evict_all(engine)
    return {"step_ms": float(np.median(times_s)) * 1e3, "scheduler_ms": host_ms}


def _until_all_decode(
    engine: Engine, images: RandomImages, versions: dict[bytes, int], batch: int
) -> None:
    tokens = 0
    while tokens < WARM_UP_STEPS * batch:
        engine.step()
        for event in engine.take_events():
            if isinstance(event, m.FetchImage):
                engine.handle([images.image(versions[event.version])])
            elif isinstance(event, m.StepTokens):
                tokens = tokens + batch if len(event.requests) == batch else 0


def ideal_ms(model: str, batch: int, context: int, adapters: int, ranks: list[int]) -> float:
    """The ideal engine's step: products, KV and adapter bytes at the best measured rates."""
    ideal = MODELS[model]
    distinct = min(adapters, batch)
    rank_sum = sum(ranks[adapter % len(ranks)] for adapter in range(distinct))
    read = batch * context * ideal.kv_bytes + rank_sum * ideal.adapter_bytes_per_rank
    return gemm_ms(ideal, batch, batch) + read / BANDWIDTH * 1e3


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    result.add_argument("--context", type=int, nargs="+", default=[1024])
    result.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 64])
    return result


def cases(arguments: argparse.Namespace, engine: Engine, vocabulary: int) -> list[dict[str, Any]]:
    """Measure every combination; prints a line for each."""
    _, layout = model_of(arguments)
    found = []
    with image_directory() as directory:
        images = RandomImages(directory, layout, arguments.ranks, max(arguments.adapters))
        for batch, context, adapters in itertools.product(
            arguments.batch, arguments.context, arguments.adapters
        ):
            case: dict[str, Any] = {"batch": batch, "context": context, "adapters": adapters}
            case |= measure_case(engine, images, batch, context, adapters, vocabulary)
            if arguments.model in MODELS:
                ideal = ideal_ms(arguments.model, batch, context, adapters, arguments.ranks)
                case |= {"ideal_ms": ideal, "times_ideal": case["step_ms"] / ideal}
            print("  ".join(f"{name} {_short(value)}" for name, value in case.items()), flush=True)
            found.append(case)
    return found


def _short(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    base_model, layout = model_of(arguments)
    engine, _ = build(arguments, base_model, layout)
    ranks = "-".join(map(str, arguments.ranks))
    write_result(
        f"step-{Path(arguments.model).name}-r{ranks}",
        benchmark="step",
        device=device_name(arguments.device),
        config={"model": arguments.model, "ranks": arguments.ranks, "dtype": arguments.dtype},
        metrics={"cases": cases(arguments, engine, base_model.vocab_size)},
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
