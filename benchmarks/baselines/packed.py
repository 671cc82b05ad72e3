"""Merged copies of the model that share a card: S-LoRA's "vLLM-packed", on this engine.

    python -m benchmarks.baselines.packed --model llama-3-8b --copies 1 2 5

Each copy has its own weights, graphs and an equal part of the card's memory, and serves the
requests of one adapter without LoRA arithmetic. The copies run in one process, a step of each in
turn with two in flight, so that no time is lost between processes. Beside them one engine serves
the same adapters on the fly. Where the copies do not fit, their row says so.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, NamedTuple

from benchmarks.baselines.common import baseline_parser, baseline_trace, write_cases
from benchmarks.building import build, model_of, pool_gib
from benchmarks.driver import Driver
from benchmarks.engine import distinct_prompts
from benchmarks.random_images import RandomImages, image_directory
from benchmarks.results_file import spread
from benchmarks.trace_run import TraceRun
from lorry.client.bench.trace import NO_ADAPTER, TraceRequest
from lorry.worker.config import MEMORY_FRACTION
from lorry.worker.device_memory import PoolDoesNotFit
from lorry.worker.engine import Engine


def build_copies(arguments: argparse.Namespace, copies: int) -> list[Engine]:
    """Engines with equal parts of the memory; raises PoolDoesNotFit."""
    base_model, layout = model_of(arguments)
    options = argparse.Namespace(**vars(arguments))
    if arguments.pool_gib is not None:
        options.pool_gib = arguments.pool_gib / copies
    return [
        build(options, base_model, layout, memory_fraction=MEMORY_FRACTION * number / copies)[0]
        for number in range(1, copies + 1)
    ]


class Load(NamedTuple):
    """What one engine is to serve."""

    engine: Engine
    trace: Sequence[TraceRequest]
    prompts: Sequence[list[int]]


def serve(loads: Sequence[Load], images: RandomImages) -> float:
    """Seconds until the last request has ended; the engines take a step each in turn."""
    runs = [
        TraceRun(load.engine, images, load.trace, first=time.time_ns(), at_arrivals=False)
        for load in loads
    ]
    started_s = time.perf_counter()
    for run, load in zip(runs, loads, strict=True):
        run.start(load.prompts, load.engine.scheduler.limits.max_context_tokens)
    while outstanding := [run for run in runs if run.is_outstanding]:
        for run in outstanding:
            run.advance()
    return time.perf_counter() - started_s


def packed_loads(
    engines: Sequence[Engine], trace: Sequence[TraceRequest], prompts: Sequence[list[int]]
) -> list[Load]:
    """The requests of each adapter for the engine of its number, as the base model's."""
    places: list[list[int]] = [[] for _ in engines]
    for place, request in enumerate(trace):
        places[request.adapter].append(place)
    return [
        Load(
            engine,
            [replace(trace[place], adapter=NO_ADAPTER) for place in of],
            [prompts[place] for place in of],
        )
        for engine, of in zip(engines, places, strict=True)
        if of
    ]


def measure(arguments: argparse.Namespace, copies: int, *, packed: bool) -> dict[str, Any]:
    """Requests a second of so many copies, or of one engine with as many adapters."""
    _, layout = model_of(arguments)
    trace = baseline_trace(arguments, copies)
    try:
        engines = build_copies(arguments, copies if packed else 1)
    except PoolDoesNotFit as error:
        return {"does_not_fit": str(error)}
    return {
        "req_per_s": spread(rates(engines, trace, arguments, packed=packed), digits=3),
        "pool_gib_of_each": round(pool_gib(engines[0], layout), 2),
    }


def rates(
    engines: Sequence[Engine],
    trace: Sequence[TraceRequest],
    arguments: argparse.Namespace,
    *,
    packed: bool,
) -> list[float]:
    """Requests a second of each run."""
    base_model, layout = model_of(arguments)
    found = list[float]()
    with image_directory() as directory:
        images = RandomImages(
            directory, layout, arguments.ranks, 1 + max(request.adapter for request in trace)
        )
        for number in range(arguments.runs):
            prompts = distinct_prompts(trace, base_model.vocab_size, number)
            one = [Load(engines[0], trace, prompts)]
            loads = packed_loads(engines, trace, prompts) if packed else one
            found.append(len(trace) / serve(loads, images))
            Driver(engines[0], images, []).evict_all()
    return found


def parser() -> argparse.ArgumentParser:
    return baseline_parser(__doc__, "copies")


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    cases = list[dict[str, Any]]()
    # A process for each, since only its end surely gives all memory of the device back.
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as processes:
        for copies in arguments.copies:
            case: dict[str, Any] = {"copies": copies}
            for name, packed in (("packed", True), ("on_the_fly", False)):
                run = processes.submit(measure, arguments, copies, packed=packed)
                case[name] = run.result()
            print(case, flush=True)
            cases.append(case)
    write_cases("packed", arguments, cases)


if __name__ == "__main__":
    main()
