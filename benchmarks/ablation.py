"""What each part of the design is worth: a trace with the whole engine, and without one part.

    python -m benchmarks.ablation --model llama-3-8b --pool-gib 16 --ranks 8 16 32 64

All variants run in turns on one engine, so that a drift of clocks meets all;
`benchmarks/variants.py` says what each leaves out. The pool is to be so small that memory binds: a
run of the whole engine without evictions is an error. In float32 a variant that changes the tokens
is an error too, where it does not sum in another order; in fewer bits a product's rounding depends
on the rows beside it.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.building import build, device_name, engine_parser, model_of, pool_gib
from benchmarks.driver import Driver
from benchmarks.engine import distinct_prompts
from benchmarks.random_images import TARGETS, RandomImages, image_directory
from benchmarks.results_file import write_result
from benchmarks.trace_run import TraceRun
from benchmarks.variants import (
    BATCH_INVARIANT,
    PADDED_RANKS,
    SPLIT_POOL,
    UNFUSED,
    WHOLE,
    adapter_pages,
    variants_on,
)
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace
from lorry.kernels.page_layout import PageLayout
from lorry.worker.engine import Engine

KEPT = (
    *("req_per_s", "out_tok_per_s", "ttft_s", "token_gap_s", "steps", "adapter_loads"),
    *("adapter_evictions", "preemptions"),
)


def measure(engine: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    """By variant: the metrics of its median run, and its throughput in every run."""
    base_model, layout = model_of(arguments)
    trace = make_trace(
        TraceSpec(
            requests=arguments.requests,
            adapters=arguments.adapters,
            alpha=arguments.alpha,
            seed=arguments.seed,
        )
    )
    variants = variants_on(arguments.device, arguments.adapter_share)
    if arguments.variants:
        variants = {name: variants[name] for name in (WHOLE, *arguments.variants)}
    if SPLIT_POOL in variants:
        _check_share(engine, layout, arguments)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with image_directory() as exact, image_directory() as padded:
        images = RandomImages(exact, layout, arguments.ranks, arguments.adapters)
        alike = RandomImages(padded, layout, [max(arguments.ranks)], arguments.adapters)
        for number in range(arguments.runs):
            prompts = distinct_prompts(trace, base_model.vocab_size, number)
            tokens = dict[str, list[list[int]]]()
            for name, variant in variants.items():
                used = alike if name == PADDED_RANKS else images
                with variant(engine):
                    metrics, tokens[name] = _run(engine, used, trace, prompts)
                runs[name].append(metrics)
                _check(name, metrics, tokens, is_exact=arguments.dtype == "fp32")
                print(f"run {number}, {name}: {metrics['req_per_s']:.2f} req/s", flush=True)
    return {name: _summary(of) for name, of in runs.items()}


def _check_share(engine: Engine, layout: PageLayout, arguments: argparse.Namespace) -> None:
    """Raise SystemExit if the largest adapter could never be loaded into a split pool."""
    needed = layout.pages(TARGETS, max(arguments.ranks))
    given = adapter_pages(engine, arguments.adapter_share)
    if needed > given:
        raise SystemExit(
            f"--adapter-share {arguments.adapter_share:g} is {given} pages, but an adapter of rank "
            f"{max(arguments.ranks)} has {needed}"
        )


def _check(
    name: str, metrics: dict[str, Any], tokens: dict[str, list[list[int]]], *, is_exact: bool
) -> None:
    """Raise SystemExit where a run shows nothing, or changed what it must not change."""
    if name == WHOLE and not metrics["adapter_evictions"]:
        raise SystemExit("no adapter was evicted: give a smaller --pool-gib or more --adapters")
    other_sums = (PADDED_RANKS, BATCH_INVARIANT, UNFUSED)
    if is_exact and name not in other_sums and tokens[name] != tokens[WHOLE]:
        raise SystemExit(f"{name!r} drew other tokens than the whole engine")


def _run(
    engine: Engine,
    images: RandomImages,
    trace: Sequence[TraceRequest],
    prompts: Sequence[list[int]],
) -> tuple[dict[str, Any], list[list[int]]]:
    """What was measured, and the tokens of each request."""
    run = TraceRun(engine, images, trace, first=time.time_ns(), at_arrivals=False)
    metrics = run.run(prompts, engine.scheduler.limits.max_context_tokens)
    Driver(engine, images, []).evict_all()
    return metrics, run.tokens


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle = sorted(runs, key=lambda run: run["req_per_s"])[len(runs) // 2]
    kept = {name: middle[name] for name in KEPT}
    return kept | {"req_per_s_of_runs": [run["req_per_s"] for run in runs]}


def _print(metrics: dict[str, Any]) -> None:
    print(f"{'variant':24}{'req/s':>9}{'of whole':>10}{'loads':>8}{'evictions':>11}")
    whole = metrics[WHOLE]["req_per_s_of_runs"]
    for name, of in metrics.items():
        shares = [one / other for one, other in zip(of["req_per_s_of_runs"], whole, strict=True)]
        print(
            f"{name:24}{of['req_per_s']:9.2f}{median(shares):10.2f}{of['adapter_loads']:8}"
            f"{of['adapter_evictions']:11}"
        )


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.set_defaults(pool_gib=16.0, ranks=[8, 16, 32, 64])
    result.add_argument("--requests", type=int, default=500)
    result.add_argument("--adapters", type=int, default=400)
    result.add_argument("--alpha", type=float, default=1.0, help="0 is uniform, 1 is Zipf")
    result.add_argument("--seed", type=int, default=42, help="of the trace")
    result.add_argument("--runs", type=int, default=3)
    result.add_argument(
        "--adapter-share", type=float, default=0.25, help="of the pool, where it is split"
    )
    others = [name for name in variants_on("cuda", 0.0) if name != WHOLE]
    result.add_argument(
        "--variants", nargs="+", choices=others, help="only these beside the whole engine"
    )
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = parser().parse_args()
    base_model, layout = model_of(arguments)
    engine, _ = build(arguments, base_model, layout)
    metrics = measure(engine, arguments)
    _print(metrics)
    part = "".join(f"-{name.replace(' ', '-')}" for name in arguments.variants or ())
    names = ("model", "ranks", "adapters", "requests", "alpha", "dtype", "adapter_share")
    config = {name: getattr(arguments, name) for name in names}
    write_result(
        f"ablation-{Path(arguments.model).name}{part}",
        benchmark="ablation",
        device=device_name(arguments.device),
        config=config
        | {"trace_seed": arguments.seed, "pool_gib": round(pool_gib(engine, layout), 2)},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
