"""Eight workers and two thousand adapters: where requests go, what is loaded, and a loss.

python -m benchmarks.studies.placement
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.simulation import h200
from benchmarks.simulation.run import Setting, Simulation
from benchmarks.studies.common import LORRY, figures, write_study
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace
from lorry.router.placement import Placement
from lorry.router.policies import make_policies
from lorry.router.request import Request
from lorry.router.worker import Worker

WORKERS, ADAPTERS, RANKS = 8, 2000, (8, 16, 32, 64)
POOL_SHARE = 0.4  # of the measured pool, so that not all adapters fit
REQ_PER_S = 40.0  # of each worker: 0.8 of what it can do


class RandomPlacement:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def place(self, request: Request, workers: Sequence[Worker]) -> Worker | None:
        return self._random.choice(workers) if workers else None


def setting() -> Setting:
    one = h200.fitted()
    limits = replace(one.limits, pool_pages=int(one.limits.pool_pages * POOL_SHARE))
    return replace(one, limits=limits, num_workers=WORKERS, ranks=RANKS, options=LORRY)


def run(
    trace: Sequence[TraceRequest], placement: Placement | None, lost_at_s: float | None = None
) -> dict[str, Any]:
    policies = make_policies(LORRY)
    if placement is not None:
        policies = replace(policies, placement=placement)
    simulation = Simulation(setting(), trace, policies=policies)
    if lost_at_s is not None:
        simulation.clock.at(lost_at_s, lambda: simulation.router.lose("w3"))
    records = simulation.run()
    busy_s = np.array([worker.counts.output_tokens for worker in simulation.workers])
    return figures(records) | {
        "loads": sum(worker.adapters.num_loads for worker in simulation.workers),
        "loaded_bytes": sum(worker.adapters.loaded_bytes for worker in simulation.workers),
        "imbalance": float(busy_s.max() / busy_s.mean() - 1),
        "requeued": simulation.dispatcher.num_requeued,
        "failed": sum(not record.ok for record in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    rate = REQ_PER_S * WORKERS
    trace = make_trace(
        TraceSpec(requests=int(rate * arguments.seconds), adapters=ADAPTERS, rate=rate)
    )
    metrics = {
        "residency": run(trace, None),
        "random": run(trace, RandomPlacement(0)),
        "one_lost": run(trace, None, arguments.seconds / 2),
    }
    config = {"seconds": arguments.seconds, "workers": WORKERS, "adapters": ADAPTERS}
    write_study("placement", config, metrics)


if __name__ == "__main__":
    main()
