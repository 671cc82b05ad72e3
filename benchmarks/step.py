"""The time of a decode step by batch, context, adapters and rank, beside the ideal engine's.

    python -m benchmarks.step --model llama-3-8b --batch 64 --context 1024 --adapters 64 --ranks 16

The engine is the very one that the worker serves with. Requests decode at the asked context, which
they reach without computing it (`benchmarks/contexts.py`), over random numbers. The ideal step is
that of `benchmarks/roofline.py`. Of the host it tells the CPU time of the whole process, in which
it also waits for the GPU, and what planning, launching and committing take; of the GPU the kernels
and copies that ran, launches, and how long it was busy, from a few steps under the profiler.
"""

import argparse
import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.building import build, device_name, engine_parser, model_of
from benchmarks.card import Card, find_card
from benchmarks.contexts import contexts, fill_pool, shift_contexts
from benchmarks.driver import Driver, greedy
from benchmarks.launches import launches_of
from benchmarks.random_images import TARGETS, RandomImages, image_directory
from benchmarks.results_file import RESULTS, write_result
from benchmarks.roofline import IdealModel, ideal_model
from lorry.worker import messages as m
from lorry.worker.engine import Engine

MEASURED_STEPS = 48
WARM_UP_STEPS = 8
PROFILED_STEPS = 4
PROMPT_TOKENS = 8
NO_RANK = 0


class Case(NamedTuple):
    context: int
    batch: int
    adapters: int
    rank: int  # NO_RANK without adapters

    def pages(self, engine: Engine, adapter_pages: int) -> int:
        """What it needs of the pool, with a page for each sequence to grow into."""
        tokens = self.context + MEASURED_STEPS + WARM_UP_STEPS
        of_sequence = -(-tokens // engine.scheduler.table.page_tokens) + 1
        return self.batch * of_sequence + self.adapters * adapter_pages


@contextmanager
def decoding(engine: Engine, images: RandomImages, case: Case) -> Iterator[Driver]:
    """While the block runs, the case's requests decode, from a little before its context."""
    driver, first = Driver(engine, images, range(case.adapters)), time.time_ns()
    numbers = list(range(first, first + case.batch))
    for index, number in enumerate(numbers):
        version = images.version(index % case.adapters) if case.adapters else b""
        prompt = [3 + index % 100] * PROMPT_TOKENS
        engine.handle([greedy(number, version, prompt, case.context + 2 * MEASURED_STEPS)])
    while len(contexts(engine)) < case.batch:
        driver.step()
    steps_before = MEASURED_STEPS // 2 + WARM_UP_STEPS
    shift_contexts(engine, case.context - steps_before - int(contexts(engine).mean()))
    for _ in range(WARM_UP_STEPS):
        driver.step()
    yield driver
    engine.handle([m.Cancel(numbers)])
    driver.evict_all()


def measure(driver: Driver) -> dict[str, Any]:
    """Medians of a step's times, and what the host did."""
    engine, host, replays = driver.engine, driver.engine.host_time, driver.replays
    plan_s, launch_s, commit_s = host.plan_s, host.launch_s, host.commit_s
    context, cpu_s = int(contexts(engine).mean()), time.process_time()
    times_s = [_timed_step(driver) for _ in range(MEASURED_STEPS)]
    per_step_ms, replays = 1e3 / MEASURED_STEPS, driver.replays - replays
    return {
        "mean_context": context + MEASURED_STEPS // 2,
        "step_ms": float(np.median(times_s)) * 1e3,
        "cpu_ms": (time.process_time() - cpu_s) * per_step_ms,
        "plan_ms": (host.plan_s - plan_s) * per_step_ms,
        "launch_ms": (host.launch_s - launch_s) * per_step_ms,
        "commit_ms": (host.commit_s - commit_s) * per_step_ms,
        "graph_replays": replays,
        "eager_steps": MEASURED_STEPS - replays,
    }


def _timed_step(driver: Driver) -> float:
    started_s = time.perf_counter()
    driver.step()
    return time.perf_counter() - started_s


def ideal_ms(card: Card, model: IdealModel, case: Case, context: int) -> float:
    """The ideal engine's step: products, KV and adapter bytes at the card's best rates."""
    read = case.batch * context * model.kv_bytes
    read += case.adapters * case.rank * model.adapter_bytes_per_rank
    return card.products[model.name].ms(case.batch, case.batch) + read / card.bytes_per_s * 1e3


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Every combination; adapters beyond the batch are left out, since no step would use them."""
    for context, batch in itertools.product(arguments.context, arguments.batch):
        for adapters in arguments.adapters:
            if adapters == 0:
                yield Case(context, batch, 0, NO_RANK)
            elif adapters <= batch:
                yield from (Case(context, batch, adapters, rank) for rank in arguments.ranks)


def measure_all(arguments: argparse.Namespace, engine: Engine) -> list[dict[str, Any]]:
    """Measure what the pool has room for, then profile; prints a line for each case."""
    _, layout = model_of(arguments)
    found, most = dict[Case, dict[str, Any]](), max(arguments.adapters)
    with ExitStack() as directories:
        images = {
            rank: RandomImages(directories.enter_context(image_directory()), layout, [rank], most)
            for rank in arguments.ranks
        }
        images[NO_RANK] = images[arguments.ranks[0]]
        for case in cases(arguments):
            adapter_pages = layout.pages(TARGETS, case.rank) if case.rank else 0
            if case.pages(engine, adapter_pages) > engine.scheduler.pool.total:
                print(f"the pool has no room for {case}", flush=True)
                continue
            with decoding(engine, images[case.rank], case) as driver:
                found[case] = case._asdict() | measure(driver)
            found[case] |= _ideal(arguments, case, found[case])
            _print(found[case])
        # After all timing, since what was profiled once may stay a little slower.
        for case in [case for case in found if _is_profiled(case, arguments)]:
            with decoding(engine, images[case.rank], case) as driver:
                launches = launches_of(driver.step, PROFILED_STEPS)
            _print(case._asdict() | launches)
            found[case] |= launches
    return list(found.values())


def _is_profiled(case: Case, arguments: argparse.Namespace) -> bool:
    """Of one context only: launches do not depend on the context."""
    is_asked = bool(arguments.profile) and arguments.device == "cuda"
    return is_asked and bool(case.context == arguments.context[0])


def _ideal(arguments: argparse.Namespace, case: Case, measured: dict[str, Any]) -> dict[str, float]:
    card = find_card(device_name(arguments.device), (RESULTS, arguments.directory))
    model = ideal_model(card, arguments.model)
    if card is None or model is None:
        return {}
    ideal = ideal_ms(card, model, case, measured["mean_context"])
    return {"ideal_ms": ideal, "times_ideal": measured["step_ms"] / ideal}


def _print(row: dict[str, Any]) -> None:
    print("  ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)


def _short(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.set_defaults(ranks=[16, 64])
    result.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256, 512])
    result.add_argument("--context", type=int, nargs="+", default=[512, 1024])
    result.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 64, 200])
    result.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    options = parser()
    arguments = options.parse_args()
    tokens = PROMPT_TOKENS + max(arguments.context) + 2 * MEASURED_STEPS
    if tokens > arguments.max_context_tokens:
        options.error(
            f"--context {max(arguments.context)} needs --max-context-tokens {tokens}, "
            f"got {arguments.max_context_tokens}"
        )
    base_model, layout = model_of(arguments)
    engine, _ = build(arguments, base_model, layout)
    fill_pool(engine)
    ranks = "-".join(map(str, arguments.ranks))
    write_result(
        f"step-{Path(arguments.model).name}-r{ranks}",
        benchmark="step",
        device=device_name(arguments.device),
        config={"model": arguments.model, "ranks": arguments.ranks, "dtype": arguments.dtype},
        metrics={"cases": measure_all(arguments, engine)},
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
