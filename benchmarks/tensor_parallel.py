"""Steps and a trace of an engine of several GPUs: what LoRA costs there, and what of it is talk.

    python -m benchmarks.tensor_parallel --model llama-2-13b --tensor-parallel 2 --lora replicated

`--lora` is how ranks share adapters: by a strategy of the worker, or `silent`, S-LoRA's without its
exchange, which computes wrong tokens and tells what the exchange costs. Each run measures decode
steps and the trace without adapters too. The first rank is in this process; of the steps under the
profiler it tells the time of collectives, in which a rank also waits for the others. Weights are
random; a model that does not fit is refused before it is loaded.
"""

import argparse
import dataclasses
import faulthandler
import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from benchmarks.building import (
    CONFIGS,
    built,
    device_name,
    engine_config,
    engine_parser,
    pool_gib,
)
from benchmarks.driver import Driver
from benchmarks.engine import distinct_prompts
from benchmarks.launches import launches_of
from benchmarks.other_ranks import other_ranks
from benchmarks.random_images import TARGETS, RandomImages, image_directory
from benchmarks.results_file import write_result
from benchmarks.silent_rank import SILENT_COMMAND, silenced
from benchmarks.step import PROFILED_STEPS, Case, decoding, measure
from benchmarks.trace_run import TraceRun
from lorry.client.bench.trace import TraceSpec, make_trace
from lorry.kernels.page_layout import PageLayout, TpStrategy
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.service_config import DTYPES
from lorry.worker.engine import Engine
from lorry.worker.rank_process import end
from lorry.worker.ranks import RANK_COMMAND

STRATEGIES = {
    "replicated": TpStrategy.REPLICATED,
    "slora": TpStrategy.SLORA,
    "silent": TpStrategy.SLORA,
}


def layout_of(arguments: argparse.Namespace, base_model: BaseModel) -> PageLayout:
    """Of the first rank."""
    size = arguments.tensor_parallel
    return PageLayout(
        geometry=base_model.geometry,
        dtype=DTYPES[arguments.dtype],
        tp_size=size,
        tp_strategy=STRATEGIES[arguments.lora] if size > 1 else None,
    )


def cases(arguments: argparse.Namespace, engine: Engine, images: RandomImages) -> list[Case]:
    """Every batch, without adapters and with one for each sequence, that the pool has room for."""
    found = []
    for batch, most in itertools.product(arguments.batch, (0, arguments.adapters)):
        case = Case(arguments.context, batch, min(batch, most), max(arguments.ranks))
        largest = images.layout.pages(TARGETS, case.rank)
        if case.pages(engine, largest) <= engine.scheduler.pool.total:
            found.append(case)
        else:
            print(f"the pool has no room for {case}", flush=True)
    return found


def steps(engine: Engine, images: RandomImages, cases: Sequence[Case]) -> list[Any]:
    """Decode steps of the cases."""
    found = []
    for case in cases:
        with decoding(engine, images, case) as driver:
            row = {"batch": case.batch, "adapters": case.adapters} | measure(driver)
        found.append(row)
        _print(row)
    return found


def profiled(engine: Engine, images: RandomImages, cases: Sequence[Case]) -> list[Any]:
    """What the steps launch; after all timing, since it may slow down what comes later."""
    found = []
    for case in cases:
        with decoding(engine, images, case) as driver:
            launches = launches_of(driver.step, PROFILED_STEPS)
        found.append({"batch": case.batch, "adapters": case.adapters} | launches)
        _print(found[-1])
    return found


def trace(
    arguments: argparse.Namespace, engine: Engine, images: RandomImages, adapters: int
) -> dict[str, Any]:
    """One run, all requests at once."""
    spec = TraceSpec(requests=arguments.requests, adapters=adapters, alpha=1.0, seed=arguments.seed)
    requests = make_trace(spec)
    prompts = distinct_prompts(requests, arguments.vocabulary, 0)
    run = TraceRun(engine, images, requests, first=time.time_ns(), at_arrivals=False)
    metrics = run.run(prompts, engine.scheduler.limits.max_context_tokens)
    Driver(engine, images, []).evict_all()
    names = ("req_per_s", "out_tok_per_s", "steps", "adapter_loads", "preemptions", "ttft_s")
    metrics = {"adapters": adapters} | {name: metrics[name] for name in names}
    print(f"trace with {adapters} adapters: {metrics['req_per_s']:.2f} req/s", flush=True)
    return metrics


def measure_all(arguments: argparse.Namespace, base_model: BaseModel) -> dict[str, Any]:
    layout = layout_of(arguments, base_model)
    config = dataclasses.replace(
        engine_config(arguments, base_model, layout), one_shot_sums=arguments.one_shot_sums
    )
    is_silent = arguments.lora == "silent"
    arguments.vocabulary = base_model.vocab_size
    with ExitStack() as stack:
        stack.enter_context(silenced() if is_silent else nullcontext())
        command = SILENT_COMMAND if is_silent else RANK_COMMAND
        engine = built(config, base_model, stack.enter_context(other_ranks(config, command)))
        directory = stack.enter_context(image_directory())
        images = RandomImages(directory, layout, arguments.ranks, arguments.adapters)
        fitting = cases(arguments, engine, images)
        return {
            "pool_gib": round(pool_gib(engine, layout), 2),
            "pool_pages": engine.scheduler.pool.total,
            "steps": steps(engine, images, fitting),
            "traces": [trace(arguments, engine, images, n) for n in (0, arguments.adapters)],
            "launches": profiled(engine, images, fitting if arguments.device == "cuda" else ()),
        }


def _print(row: dict[str, Any]) -> None:
    values = (f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print("  ".join(values), flush=True)


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.set_defaults(
        model="llama-2-13b", ranks=[8, 16, 32, 64], step_tokens=512, max_running=256
    )
    result.add_argument("--tensor-parallel", type=int, default=2, help="GPUs")
    result.add_argument("--lora", choices=STRATEGIES, default="replicated")
    result.add_argument(
        "--one-shot-sums",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as the worker's option",
    )
    result.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256])
    result.add_argument("--context", type=int, default=512)
    result.add_argument("--adapters", type=int, default=200)
    result.add_argument("--requests", type=int, default=200)
    result.add_argument("--seed", type=int, default=42, help="of the trace")
    result.add_argument("--limit-s", type=int, default=240, help="then say where it hangs, and end")
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    faulthandler.dump_traceback_later(arguments.limit_s, exit=True)
    base_model, size = read_base_model(CONFIGS / arguments.model), arguments.tensor_parallel
    lora = f"-{arguments.lora}" if size > 1 else ""
    sums = "-nccl" if size > 1 and not arguments.one_shot_sums else ""
    write_result(
        f"tensor-parallel-{base_model.directory.name}-{size}{lora}{sums}",
        benchmark="tensor_parallel",
        device=device_name(arguments.device),
        config={
            "model": base_model.directory.name,
            "tensor_parallel": size,
            "lora": arguments.lora if size > 1 else None,
            "one_shot_sums": arguments.one_shot_sums,
            "ranks": arguments.ranks,
            "adapters": arguments.adapters,
            "context": arguments.context,
            "requests": arguments.requests,
            "step_tokens": arguments.step_tokens,
            "max_running": arguments.max_running,
            "trace_seed": arguments.seed,
            "dtype": arguments.dtype,
            "modules": list(TARGETS),
        },
        metrics=measure_all(arguments, base_model),
        directory=arguments.directory,
        commit=arguments.commit,
    )
    end(0)


if __name__ == "__main__":
    main()
