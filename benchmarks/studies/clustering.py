"""How many adapters a batch should have: the limit d over popularities of adapters.

    python -m benchmarks.studies.clustering

On S-LoRA's A10G, where an adapter's rank costs most.
"""

import argparse
from dataclasses import replace
from typing import Any

from rich.progress import track

from benchmarks.simulation.run import simulate
from benchmarks.simulation.slora_recorded import A10G_S2
from benchmarks.studies.common import LORRY, figures, write_study
from benchmarks.studies.slora import worker_setting
from lorry.client.bench.trace import TraceSpec, make_trace

LIMITS = (0, 1, 2, 4, 8, 16, 32)  # 0: none
ALPHAS = (0.0, 0.5, 1.0)
ADAPTERS, RATE, SECONDS = 32, 2.0, 120
METRICS = ("req_per_s", "attainment", "satisfaction", "goodput_req_per_s")


def measure(limit: int, alpha: float, seeds: int) -> dict[str, float]:
    """Means over seeds."""
    options = replace(LORRY, cluster_adapters=limit)
    rows = []
    for seed in range(seeds):
        spec = TraceSpec(
            requests=int(RATE * SECONDS), adapters=ADAPTERS, alpha=alpha, rate=RATE, seed=10 * seed
        )
        rows.append(figures(simulate(worker_setting(A10G_S2, options), make_trace(spec))))
    return {metric: sum(row[metric] for row in rows) / seeds for metric in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    cells: list[dict[str, Any]] = [
        {"limit": limit, "alpha": alpha} | measure(limit, alpha, arguments.seeds)
        for alpha in track(ALPHAS, description="popularities")
        for limit in LIMITS
    ]
    config = {"seeds": arguments.seeds, "adapters": ADAPTERS, "rate": RATE, "seconds": SECONDS}
    write_study("clustering", config, {"cells": cells})


if __name__ == "__main__":
    main()
