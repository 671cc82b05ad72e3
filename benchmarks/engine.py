"""A trace through the very engine that the worker serves with.

    python -m benchmarks.engine --model llama-3-8b --adapters 200 --ranks 16

All requests are submitted at once. Weights are random normal, prompts are distinct, and each
adapter has bytes, a version and pages of its own; page images are in host memory before the clock
starts, loads to the GPU are inside it. The scheduler does not know output lengths: max_tokens is
what the context allows, and a request is cancelled when it has the asked number of tokens.
"""

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.random_images import TARGETS, RandomImages, image_directory
from benchmarks.results_file import RESULTS, write_result
from benchmarks.roofline import MODELS, ideal_seconds
from benchmarks.trace import TraceRequest, make_trace
from lorry.kernels.page_layout import PageLayout
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.service_config import DTYPES
from lorry.worker import messages as m
from lorry.worker.building import build_engine
from lorry.worker.config import EngineConfig
from lorry.worker.cuda_runner import CudaRunner
from lorry.worker.engine import Engine

CONFIGS = Path(__file__).parent / "models"
GIB = 1 << 30


class Run:
    """One trace through the engine, and what was seen of it."""

    def __init__(
        self, engine: Engine, images: RandomImages, trace: Sequence[TraceRequest], first: int
    ) -> None:
        self._engine = engine
        self._trace = trace
        self._first = first  # number of the first request
        self._images = images
        count = len(trace)
        self._left = np.array([request.output_tokens for request in trace])
        self._first_token_s = np.zeros(count)
        self._last_token_s = np.zeros(count)
        self._gaps: list[np.ndarray] = []
        self._ended_s = np.zeros(count)
        self._adapters = {images.version(r.adapter): r.adapter for r in trace}
        self._outstanding = count

    def run(self, prompts: Sequence[list[int]], max_context_tokens: int) -> dict[str, Any]:
        before = self._engine.status()
        scheduler_before_s = self._engine.host_s
        replays, padded_rows = self._replays(), self._padded_rows()
        started_s = time.perf_counter()
        self._engine.handle(self._submits(prompts, max_context_tokens))
        while self._outstanding:
            self._engine.step()
            self._note(self._engine.take_events(), time.perf_counter() - started_s)
        seconds = time.perf_counter() - started_s
        after = self._engine.status()
        steps, after_replays = after.steps - before.steps, self._replays()
        return {
            "seconds": seconds,
            "req_per_s": len(self._trace) / seconds,
            "out_tok_per_s": sum(r.output_tokens for r in self._trace) / seconds,
            "latency_s": _summary(self._ended_s),
            "ttft_s": _summary(self._first_token_s),
            "token_gap_s": _summary(np.concatenate(self._gaps)),
            "steps": steps,
            "adapter_loads": after.adapter_loads - before.adapter_loads,
            "adapter_evictions": after.adapter_evictions - before.adapter_evictions,
            "preemptions": after.preemptions - before.preemptions,
            "graph_replays": after_replays - replays,
            "eager_steps": steps - (after_replays - replays),
            "padded_rows": self._padded_rows() - padded_rows,
            "scheduler_ms_per_step": (self._engine.host_s - scheduler_before_s) / steps * 1e3,
        }

    def _submits(self, prompts: Sequence[list[int]], max_context_tokens: int) -> Iterator[m.Submit]:
        for index, request in enumerate(self._trace):
            yield m.Submit(
                request=self._first + index,
                tenant="default",
                version=self._images.version(request.adapter),
                token_ids=prompts[index],
                generated_tokens=0,
                max_tokens=max_context_tokens - request.prompt_tokens,
                min_tokens=0,
                stop_token_ids=[],
                temperature=0.0,
                seed=index,
                remaining_s=None,
            )

    def _replays(self) -> int:
        runner = self._engine.runner
        return runner.graphs.replays if isinstance(runner, CudaRunner) else 0

    def _padded_rows(self) -> int:
        runner = self._engine.runner
        return runner.padded_rows if isinstance(runner, CudaRunner) else 0

    def _note(self, events: list[m.Event], now_s: float) -> None:
        for event in events:
            if isinstance(event, m.StepTokens):
                self._note_tokens(np.array(event.requests) - self._first, now_s)
            elif isinstance(event, m.Finished):
                self._outstanding -= 1
                assert event.failure is None, event.failure
            elif isinstance(event, m.FetchImage):
                self._engine.handle([self._images.image(self._adapters[event.version])])

    def _note_tokens(self, index: np.ndarray, now_s: float) -> None:
        index = index[self._left[index] > 0]
        is_first = self._first_token_s[index] == 0
        self._gaps.append(now_s - self._last_token_s[index[~is_first]])
        self._first_token_s[index[is_first]] = now_s
        self._last_token_s[index] = now_s
        self._left[index] -= 1
        done = index[self._left[index] == 0]
        if len(done):
            self._ended_s[done] = now_s
            self._engine.handle([m.Cancel((done + self._first).tolist())])


def _summary(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
    }


def distinct_prompts(trace: Sequence[TraceRequest], vocabulary: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, vocabulary, request.prompt_tokens).tolist() for request in trace]


def build(
    arguments: argparse.Namespace, base_model: BaseModel, layout: PageLayout
) -> tuple[Engine, EngineConfig]:
    """The engine that the arguments describe, with random weights."""
    config = EngineConfig(
        model=base_model.directory,
        load_format="dummy",
        device=arguments.device,
        dtype=arguments.dtype,
        pool_pages=int(arguments.pool_gib * GIB) // layout.page_bytes,
        max_running=arguments.max_running,
        step_tokens=arguments.step_tokens,
        max_rank=max(64, *arguments.ranks),
        max_context_tokens=arguments.max_context_tokens,
    )
    started_s = time.perf_counter()
    engine = build_engine(config, base_model)
    print(f"engine built in {time.perf_counter() - started_s:.1f} s", flush=True)
    return engine, config


def measure(
    arguments: argparse.Namespace, adapters: int, engine: Engine, config: EngineConfig
) -> dict[str, Any]:
    """Run the trace `arguments.runs` times; the metrics are those of the median run."""
    base_model = read_base_model(config.model)
    layout = PageLayout(geometry=base_model.geometry, dtype=config.page_dtype)
    trace = make_trace(
        requests=arguments.requests,
        adapters=adapters,
        alpha=arguments.alpha,
        seed=arguments.seed,
    )
    context = config.max_context_tokens or base_model.max_context_tokens
    runs = []
    with image_directory() as directory:
        images = RandomImages(directory, layout, arguments.ranks, adapters)
        for number in range(arguments.runs):
            prompts = distinct_prompts(trace, base_model.vocab_size, number)
            first = time.time_ns()
            runs.append(Run(engine, images, trace, first).run(prompts, context))
            print(f"run {number}: {runs[-1]['req_per_s']:.2f} req/s", flush=True)
            evict_all(engine)
    runs.sort(key=lambda run: run["req_per_s"])
    metrics = runs[len(runs) // 2] | {"req_per_s_of_runs": [run["req_per_s"] for run in runs]}
    if arguments.model in MODELS:
        ideal_s = ideal_seconds(MODELS[arguments.model], trace, arguments.ranks)
        metrics["ideal_req_per_s"] = len(trace) / ideal_s
    return metrics


def evict_all(engine: Engine) -> None:
    """Forget every adapter, so that the next run loads them again."""
    versions = [adapter.version for adapter in engine.scheduler.residency]
    engine.handle([m.EvictAdapter(0, version) for version in versions])
    engine.step()
    engine.take_events()
    engine.scheduler.check_integrity()


def engine_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of the engine and of the result file."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--model", default="llama-3-8b", help="a directory of benchmarks/models")
    result.add_argument("--ranks", type=int, nargs="+", default=[16], help="cycled over adapters")
    result.add_argument("--pool-gib", type=float, default=108.0)
    result.add_argument("--step-tokens", type=int, default=1024)
    result.add_argument("--max-running", type=int, default=512)
    result.add_argument("--max-context-tokens", type=int, default=4096)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result files")
    result.add_argument("--commit", help="where the tree came without its history")
    return result


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.add_argument("--requests", type=int, default=1000)
    result.add_argument(
        "--adapters", type=int, nargs="+", default=[200], help="numbers of; 0: the base model only"
    )
    result.add_argument("--alpha", type=float, default=1.0, help="0 is uniform, 1 is Zipf")
    result.add_argument("--seed", type=int, default=42, help="of the trace")
    result.add_argument("--runs", type=int, default=3)
    return result


def result_config(arguments: argparse.Namespace, adapters: int) -> dict[str, Any]:
    return {
        "model": arguments.model,
        "ranks": arguments.ranks,
        "adapters": adapters,
        "requests": arguments.requests,
        "trace_seed": arguments.seed,
        "alpha": arguments.alpha,
        "tensor_parallel": 1,
        "step_tokens": arguments.step_tokens,
        "max_running": arguments.max_running,
        "pool_gib": arguments.pool_gib,
        "dtype": arguments.dtype,
        "modules": list(TARGETS),
    }


def model_of(arguments: argparse.Namespace) -> tuple[BaseModel, PageLayout]:
    base_model = read_base_model(CONFIGS / arguments.model)
    return base_model, PageLayout(geometry=base_model.geometry, dtype=DTYPES[arguments.dtype])


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    engine, config = build(arguments, *model_of(arguments))
    for adapters in arguments.adapters:
        ranks = "-".join(map(str, arguments.ranks))
        write_result(
            f"engine-{Path(arguments.model).name}-{adapters}-r{ranks}-{arguments.alpha:g}",
            benchmark="engine",
            device=device_name(arguments.device),
            config=result_config(arguments, adapters),
            metrics=measure(arguments, adapters, engine, config),
            directory=arguments.directory,
            commit=arguments.commit,
        )


if __name__ == "__main__":
    main()
