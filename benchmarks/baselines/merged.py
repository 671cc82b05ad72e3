"""One merged adapter at a time against all adapters on the fly, as in S-LoRA's figure 9.

    python -m benchmarks.baselines.merged --model llama-3-8b --adapters 1 2 5

Merged, the engine multiplies no adapter: the requests of one adapter are served with its weights
added to the base's, then those of the next one. The clock runs through merging. With one adapter
this is the engine without LoRA arithmetic. In float32 it is an error if the tokens differ.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.baselines.common import baseline_parser, baseline_trace, write_cases
from benchmarks.baselines.merging import MergedWeights, kept_weights
from benchmarks.building import build, model_of, pool_gib
from benchmarks.driver import Driver
from benchmarks.engine import distinct_prompts
from benchmarks.random_images import RandomImages, image_directory
from benchmarks.results_file import spread
from benchmarks.trace_run import TraceRun
from lorry.client.bench.trace import NO_ADAPTER, TraceRequest
from lorry.worker.engine import Engine

Tokens = list[list[int]]


class Comparison:
    """One trace, merged and on the fly."""

    def __init__(
        self,
        engine: Engine,
        merged: MergedWeights,
        images: RandomImages,
        trace: Sequence[TraceRequest],
        prompts: Sequence[list[int]],
    ) -> None:
        self._engine = engine
        self._merged = merged
        self._images = images
        self._trace = trace
        self._prompts = prompts

    def on_the_fly(self) -> tuple[float, Tokens]:
        """Seconds, and the tokens of each request."""
        seconds, tokens = self._run(range(len(self._trace)), self._trace)
        Driver(self._engine, self._images, []).evict_all()
        return seconds, tokens

    def one_at_a_time(self) -> tuple[float, float, Tokens]:
        """Seconds, those of them that merged, and the tokens of each request."""
        seconds, merging_s = 0.0, 0.0
        tokens: Tokens = [[] for _ in self._trace]
        for adapter in sorted({request.adapter for request in self._trace}):
            places = [i for i, request in enumerate(self._trace) if request.adapter == adapter]
            merging_s += self._timed_merge(adapter)
            plain = [replace(self._trace[place], adapter=NO_ADAPTER) for place in places]
            served_s, found = self._run(places, plain)
            seconds += served_s
            for place, of in zip(places, found, strict=True):
                tokens[place] = of
        merging_s += self._timed_restore()
        return seconds + merging_s, merging_s, tokens

    def _run(self, places: Sequence[int], trace: Sequence[TraceRequest]) -> tuple[float, Tokens]:
        run = TraceRun(self._engine, self._images, trace, first=time.time_ns(), at_arrivals=False)
        prompts = [self._prompts[place] for place in places]
        metrics = run.run(prompts, self._engine.scheduler.limits.max_context_tokens)
        return metrics["seconds"], run.tokens

    def _timed_merge(self, adapter: int) -> float:
        started_s = time.perf_counter()
        self._merged.restore()
        self._merged.merge(self._images.image(adapter))
        return _elapsed_s(started_s)

    def _timed_restore(self) -> float:
        started_s = time.perf_counter()
        self._merged.restore()
        return _elapsed_s(started_s)


def _elapsed_s(started_s: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def measure(
    engine: Engine, merged: MergedWeights, adapters: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Both ways in turns."""
    base_model, layout = model_of(arguments)
    trace = baseline_trace(arguments, adapters)
    found: dict[str, list[float]] = {"merged": [], "on_the_fly": [], "merging_s": []}
    with image_directory() as directory:
        images = RandomImages(directory, layout, arguments.ranks, adapters)
        for number in range(arguments.runs):
            prompts = distinct_prompts(trace, base_model.vocab_size, number)
            comparison = Comparison(engine, merged, images, trace, prompts)
            seconds, merging_s, merged_tokens = comparison.one_at_a_time()
            found["merged"].append(len(trace) / seconds)
            found["merging_s"].append(merging_s)
            seconds, tokens = comparison.on_the_fly()
            found["on_the_fly"].append(len(trace) / seconds)
            if arguments.dtype == "fp32" and tokens != merged_tokens:
                raise SystemExit("a merged adapter drew other tokens than the same on the fly")
    return {
        "adapters": adapters,
        "merged_req_per_s": spread(found["merged"], digits=3),
        "on_the_fly_req_per_s": spread(found["on_the_fly"], digits=3),
        "merging_s": spread(found["merging_s"], digits=4),
    }


def parser() -> argparse.ArgumentParser:
    return baseline_parser(__doc__, "adapters")


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    base_model, layout = model_of(arguments)
    with kept_weights() as weights:
        engine, _ = build(arguments, base_model, layout)
    merged, cases = MergedWeights(weights[0], layout), list[dict[str, Any]]()
    for adapters in arguments.adapters:
        cases.append(measure(engine, merged, adapters, arguments))
        print(cases[-1], flush=True)
    write_cases("merged", arguments, cases, pool_gib=round(pool_gib(engine, layout), 2))


if __name__ == "__main__":
    main()
