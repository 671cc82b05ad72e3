"""What a never-seen adapter costs the streams that decode beside it.

    python -m benchmarks.cold --model llama-3-8b --seconds 60

Streams decode at a context that stays about the same (`benchmarks/contexts.py`). Beside them comes
one request a second with a short prompt: for some seconds with an adapter that is on the GPU, then
for as long with adapters that were never seen, and so on in turns. Page images lie in shared
memory, a file each; an engine's fetch of one is answered at once.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.building import build, device_name, engine_parser, model_of
from benchmarks.contexts import contexts, fill_pool, shift_contexts
from benchmarks.driver import Driver, greedy
from benchmarks.random_images import RandomImages, image_directory
from benchmarks.results_file import write_result
from benchmarks.trace_run import percentiles
from lorry.worker import messages as m
from lorry.worker.engine import Engine

STREAM_PROMPT_TOKENS = 8
DRIFT_TOKENS = 128  # that contexts grow before they are set back
WARM_UP_S = 2.0
RESIDENT, COLD = CONDITIONS = ("resident", "cold")
CONFIG = (
    *("model", "ranks", "dtype", "streams", "stream_adapters", "context", "seconds", "block"),
    *("interval", "prompt_tokens", "output_tokens"),
)


@dataclass(slots=True)
class Seen:
    """What was seen under one condition."""

    gaps_s: list[float] = field(default_factory=list)  # between the streams' tokens
    first_tokens_s: list[float] = field(default_factory=list)  # of the requests beside them

    def metrics(self) -> dict[str, Any]:
        gaps_s = np.array(self.gaps_s)
        return {
            "token_gap_s": percentiles(gaps_s) | {"max": float(gaps_s.max())},
            "first_token_s": percentiles(np.array(self.first_tokens_s)),
            "first_tokens_s": self.first_tokens_s,
            "requests": len(self.first_tokens_s),
            "steps": len(self.gaps_s),
        }


class Streams:
    """Streams that decode for ever, and requests beside them."""

    def __init__(self, driver: Driver, images: RandomImages, arguments: argparse.Namespace) -> None:
        self._driver, self._images = driver, images
        self._prompt_tokens = arguments.prompt_tokens
        self._output_tokens = arguments.output_tokens
        self._context = arguments.context
        self._next = time.time_ns()  # number of the next request
        self._streams = range(self._next, self._next + arguments.streams)
        self._beside: dict[int, tuple[float, int]] = {}  # start and tokens so far
        self._random = np.random.default_rng(0)
        for number in self._streams:
            adapter = number % arguments.stream_adapters if arguments.stream_adapters else -1
            self._submit(adapter, STREAM_PROMPT_TOKENS, arguments.context + 3 * DRIFT_TOKENS)
        while len(contexts(driver.engine)) < arguments.streams:
            driver.step()
        start = arguments.context - DRIFT_TOKENS // 2
        shift_contexts(driver.engine, start - int(contexts(driver.engine).mean()))
        self._last_s = time.perf_counter()

    def request(self, adapter: int) -> None:
        """Send a request beside the streams."""
        self._beside[self._next] = (time.perf_counter(), 0)
        self._submit(adapter, self._prompt_tokens, self._output_tokens)

    def step(self, seen: Seen) -> None:
        events = self._driver.step()
        now_s = time.perf_counter()
        for event in events:
            if isinstance(event, m.StepTokens):
                seen.gaps_s.append(now_s - self._last_s)
                self._last_s = now_s
                self._note_beside(event, seen, now_s)
            elif isinstance(event, m.Finished):
                assert event.request not in self._streams, "a stream ended"
                self._beside.pop(event.request)
        self._hold_contexts()

    def _note_beside(self, tokens: m.StepTokens, seen: Seen, now_s: float) -> None:
        for number in self._beside.keys() & set(tokens.requests):
            started_s, count = self._beside[number]
            self._beside[number] = (started_s, count + 1)
            if count == 0:
                seen.first_tokens_s.append(now_s - started_s)

    def _hold_contexts(self) -> None:
        table = self._driver.engine.scheduler.table
        rows = np.flatnonzero(table.is_decoding_R & np.isin(table.number_R, self._streams))
        if table.num_computed_R[rows].mean() > self._context + DRIFT_TOKENS // 2:
            shift_contexts(self._driver.engine, -DRIFT_TOKENS, rows)

    def _submit(self, adapter: int, prompt_tokens: int, max_tokens: int) -> None:
        prompt = self._random.integers(3, 100, prompt_tokens).tolist()
        version = self._images.version(adapter)
        self._driver.engine.handle([greedy(self._next, version, prompt, max_tokens)])
        self._next += 1


def measure(arguments: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """Both conditions in turns."""
    _, layout = model_of(arguments)
    rounds = max(1, round(arguments.seconds / arguments.block))
    a_round = int(arguments.block / arguments.interval) + 2
    # First those of the streams, then the resident one, then those that are seen once.
    resident = arguments.stream_adapters
    cold = iter(range(resident + 1, resident + 1 + rounds * a_round))
    adapters = range(resident + 1 + rounds * a_round)
    seen = {condition: Seen() for condition in CONDITIONS}
    with image_directory() as directory:
        images = RandomImages(directory, layout, arguments.ranks, len(adapters), apart=True)
        driver = Driver(engine, images, adapters)
        streams = Streams(driver, images, arguments)
        _run(streams, Seen(), repeat(resident), WARM_UP_S, arguments.interval)
        replays, steps = driver.replays, engine.scheduler.steps
        for _ in range(rounds):
            for condition, beside in ((RESIDENT, repeat(resident)), (COLD, cold)):
                _run(streams, seen[condition], beside, arguments.block, arguments.interval)
        eager_steps = engine.scheduler.steps - steps - (driver.replays - replays)
    return _compared(seen) | {"eager_steps": eager_steps}


def _run(
    streams: Streams, seen: Seen, adapters: Iterator[int], seconds: float, interval_s: float
) -> None:
    """Step for `seconds`, with a request at the middle of each interval."""
    started_s = time.perf_counter()
    due_s = started_s + interval_s / 2
    while (now_s := time.perf_counter()) < started_s + seconds:
        if now_s >= due_s:
            streams.request(next(adapters))
            due_s += interval_s
        streams.step(seen)


def _compared(seen: dict[str, Seen]) -> dict[str, Any]:
    metrics: dict[str, Any] = {name: one.metrics() for name, one in seen.items()}
    resident, cold = metrics[RESIDENT], metrics[COLD]
    for share in ("p50", "p99"):
        ratio = cold["token_gap_s"][share] / resident["token_gap_s"][share]
        metrics[f"token_gap_{share}_ratio"] = ratio
    for share in ("p50", "p99"):
        later_s = cold["first_token_s"][share] - resident["first_token_s"][share]
        metrics[f"first_token_later_{share}_s"] = later_s
    return metrics


def _print(metrics: dict[str, Any]) -> None:
    for name in CONDITIONS:
        gap, first = metrics[name]["token_gap_s"], metrics[name]["first_token_s"]
        print(
            f"{name:9} token gap ms p50 {gap['p50'] * 1e3:.2f} p99 {gap['p99'] * 1e3:.2f} "
            f"max {gap['max'] * 1e3:.2f}; first token ms p50 {first['p50'] * 1e3:.1f} "
            f"p99 {first['p99'] * 1e3:.1f}; {metrics[name]['requests']} requests, "
            f"{metrics[name]['steps']} steps"
        )
    print(
        f"cold / resident: gap p50 {metrics['token_gap_p50_ratio']:.3f} "
        f"p99 {metrics['token_gap_p99_ratio']:.3f}; first token later by "
        f"{metrics['first_token_later_p50_s'] * 1e3:.1f} ms (p50)",
        flush=True,
    )


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.add_argument("--streams", type=int, default=64)
    result.add_argument("--stream-adapters", type=int, default=16, help="that the streams use")
    result.add_argument("--context", type=int, default=1000, help="of the streams, about")
    result.add_argument("--seconds", type=float, default=60.0, help="of each condition")
    result.add_argument("--block", type=float, default=5.0, help="seconds of a turn")
    result.add_argument("--interval", type=float, default=1.0, help="seconds between requests")
    result.add_argument("--prompt-tokens", type=int, default=16, help="of the requests")
    result.add_argument("--output-tokens", type=int, default=16, help="of the requests")
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    engine, _ = build(arguments, *model_of(arguments))
    fill_pool(engine)
    metrics = measure(arguments, engine)
    _print(metrics)
    write_result(
        f"cold-{Path(arguments.model).name}",
        benchmark="cold",
        device=device_name(arguments.device),
        config={name: getattr(arguments, name) for name in CONFIG},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
