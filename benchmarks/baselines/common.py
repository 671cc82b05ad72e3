"""Options, trace and result file of the baselines that run on this engine."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.building import device_name, engine_parser
from benchmarks.results_file import write_result
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace

CONFIG = ("model", "ranks", "requests", "alpha", "dtype")


def baseline_parser(description: str | None, counted: str) -> argparse.ArgumentParser:
    """Options of the engine and of the trace; `counted` is what there are several numbers of."""
    result = engine_parser(description)
    result.add_argument("--requests", type=int, default=500)
    result.add_argument(f"--{counted}", type=int, nargs="+", default=[1, 2, 5], help="numbers of")
    result.add_argument("--alpha", type=float, default=0.0, help="0 is uniform, 1 is Zipf")
    result.add_argument("--runs", type=int, default=3)
    return result


def baseline_trace(arguments: argparse.Namespace, adapters: int) -> list[TraceRequest]:
    """For so many adapters."""
    spec = TraceSpec(requests=arguments.requests, adapters=adapters, alpha=arguments.alpha)
    return make_trace(spec)


def write_cases(
    name: str, arguments: argparse.Namespace, cases: Sequence[dict[str, Any]], **config: Any
) -> None:
    """Write the result file of the baseline `name`."""
    write_result(
        f"baseline-{name}-{Path(arguments.model).name}",
        benchmark=f"baselines.{name}",
        device=device_name(arguments.device),
        config={option: getattr(arguments, option) for option in CONFIG} | config,
        metrics={"cases": cases},
        directory=arguments.directory,
        commit=arguments.commit,
    )
