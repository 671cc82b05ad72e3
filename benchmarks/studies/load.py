"""From half of what a worker can do to three times as much: attainment and goodput by load.

python -m benchmarks.studies.load
"""

import argparse
from dataclasses import replace
from typing import Any

from rich.progress import track

from benchmarks.simulation import h200
from benchmarks.simulation.run import Setting, simulate
from benchmarks.studies.common import FCFS, LORRY, figures, write_study
from lorry.client.bench.record import Record, Slo
from lorry.client.bench.trace import TraceSpec, make_trace

LOADS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
ADAPTERS = 200
SLO = Slo(ttft_s=1.0)


def capacity_req_per_s() -> float:
    """Of one worker that is never idle."""
    simulation = h200.offline(h200.fitted(), ADAPTERS)
    return len(simulation.router.records) / simulation.clock.now_s


def served(setting: Setting, rate: float, seconds: float) -> dict[str, Any]:
    trace = make_trace(TraceSpec(requests=int(rate * seconds), adapters=ADAPTERS, rate=rate))
    records = simulate(setting, trace)
    arrivals_s = trace[-1].arrival_s
    met = sum(record.met_slo for record in records)
    return figures(records) | {
        "goodput_while_arriving_per_s": met / arrivals_s,
        "longest_abort_s": longest_abort_s(records),
    }


def longest_abort_s(records: list[Record]) -> float:
    """The longest that a request waited that was then aborted."""
    return max((r.latency_s or 0.0 for r in records if not r.ok), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    capacity = capacity_req_per_s()
    cells = []
    for load in track(LOADS, description="loads"):
        cell: dict[str, Any] = {"load": load, "allowed": min(1.0, 1.0 / load)}
        for name, options in (("fcfs", FCFS), ("lorry", LORRY)):
            setting = replace(h200.fitted(), options=options, slo=SLO)
            cell[name] = served(setting, load * capacity, arguments.seconds)
        cells.append(cell)
    config = {"seconds": arguments.seconds, "adapters": ADAPTERS, "ttft_slo_s": SLO.ttft_s}
    write_study("load", config, {"capacity_req_per_s": capacity, "cells": cells})


if __name__ == "__main__":
    main()
