"""Decode steps that rotate q and k where they add LoRA to them, beside steps that do it apart.

    python -m benchmarks.fused --model llama-3-8b

Both are steps of one engine, measured in turns, so that a drift of clocks meets both.
"""

import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.building import build, device_name, engine_parser, model_of
from benchmarks.contexts import fill_pool
from benchmarks.random_images import RandomImages, image_directory
from benchmarks.results_file import write_result
from benchmarks.step import Case, decoding, measure
from benchmarks.variants import UNFUSED, WHOLE, variants_on
from lorry.worker.engine import Engine

CASES = [
    (1, 1),
    (16, 16),
    (64, 1),
    (64, 8),
    (64, 64),
]  # batch and adapters; larger steps differ not


def measure_all(engine: Engine, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of both in every run of every case; prints a line for each case."""
    variants = {name: variants_on("cuda", 0.0)[name] for name in (WHOLE, UNFUSED)}
    _, layout = model_of(arguments)
    most = max(adapters for _, adapters in CASES)
    found = []
    for rank in arguments.ranks:
        with image_directory() as directory:
            images = RandomImages(directory, layout, [rank], most)
            for batch, adapters in CASES:
                case = Case(arguments.context, batch, adapters, rank)
                times_ms: dict[str, list[float]] = {name: [] for name in variants}
                for _ in range(arguments.runs):
                    for name, variant in variants.items():
                        with variant(engine), decoding(engine, images, case) as driver:
                            times_ms[name].append(measure(driver)["step_ms"])
                found.append(case._asdict() | _summary(times_ms))
                print(found[-1], flush=True)
    return found


def _summary(times_ms: dict[str, list[float]]) -> dict[str, Any]:
    of_runs = zip(times_ms[WHOLE], times_ms[UNFUSED], strict=True)
    saved_us = [1e3 * (apart - whole) for whole, apart in of_runs]
    rounded: Callable[[float], float] = partial(round, ndigits=3)
    return {
        "step_ms": rounded(median(times_ms[WHOLE])),
        "unfused_step_ms": rounded(median(times_ms[UNFUSED])),
        "saved_us": rounded(median(saved_us)),
        "saved_us_of_runs": [*map(rounded, saved_us)],
    }


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.set_defaults(ranks=[16, 64])
    result.add_argument("--context", type=int, default=512)
    result.add_argument("--runs", type=int, default=5)
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    engine, _ = build(arguments, *model_of(arguments))
    fill_pool(engine)
    names = ("model", "ranks", "context", "dtype")
    write_result(
        f"fused-{Path(arguments.model).name}",
        benchmark="fused",
        device=device_name(arguments.device),
        config={name: getattr(arguments, name) for name in names},
        metrics={"cases": measure_all(engine, arguments)},
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
