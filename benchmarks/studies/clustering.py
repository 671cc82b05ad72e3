"""How many adapters a batch should have: the limit d over popularities of adapters.

    python -m benchmarks.studies.clustering

On S-LoRA's A10G with the 32 adapters of its own study of this, and on its A100 with more adapters
than a batch has. Once no request has an objective, so that the limit is for all; and once all have
S-LoRA's, but are passed over for the limit nevertheless, as Lorry's are not. Each run is compared
with one of Lorry's defaults over the same trace.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, product, repeat
from typing import Any

from rich.progress import track

from benchmarks.simulation.run import NO_OBJECTIVE, Simulation
from benchmarks.simulation.slora import TTFT_S
from benchmarks.simulation.slora_recorded import A10G_S2, A100_S4, Hardware
from benchmarks.studies.common import LORRY, figures, interval, write_study
from benchmarks.studies.slora import worker_setting
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace
from lorry.router.clustering import AdapterClustering
from lorry.router.policies import Policies, make_policies
from lorry.router.request import Request

LIMITS = (0, 1, 2, 4, 8, 16, 32)  # 0: nobody is passed over
ALPHAS = (0.0, 0.5, 1.0)
ADAPTERS = {A10G_S2: 32, A100_S4: 400}
SECONDS = 120
METRICS = {
    "patient": ("req_per_s", "mean_ttft_s", "p99_ttft_s"),
    "all passed over": ("req_per_s", "attainment", "satisfaction"),
}


class ClusteringOfAll(AdapterClustering):
    """Passes over those that have an objective, too."""

    def is_limited(self, request: Request) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Crowd:
    """Whose requests are measured."""

    hardware: Hardware
    kind: str  # one of METRICS
    alpha: float

    def policies(self, limit: int) -> Policies:
        options = replace(LORRY, cluster_adapters=limit)
        policies = make_policies(options)
        if self.kind == "patient" or not limit:
            return policies
        clustering = ClusteringOfAll(max_adapters=limit, max_wait_s=options.cluster_wait_s)
        return replace(policies, clustering=clustering)

    def run(self, policies: Policies, seed: int) -> dict[str, float]:
        setting = worker_setting(self.hardware, LORRY)
        if self.kind == "patient":
            setting = replace(setting, slo=NO_OBJECTIVE)
        found = figures(Simulation(setting, self.trace(seed), policies=policies).run())
        times = {f"{rank}_ttft_s": found["ttft_s"][rank] for rank in ("mean", "p99")}
        return {name: (found | times)[name] for name in METRICS[self.kind]}

    def trace(self, seed: int) -> list[TraceRequest]:
        rate = self.hardware.rate
        return make_trace(
            TraceSpec(
                requests=int(rate * SECONDS),
                adapters=ADAPTERS[self.hardware],
                alpha=self.alpha,
                rate=rate,
                seed=10 * seed,
            )
        )


def measured(crowd: Crowd, seeds: int) -> list[dict[str, Any]]:
    """By limit: means over the seeds, and by what they differ from those of the defaults."""
    defaults = [crowd.run(make_policies(LORRY), seed) for seed in range(seeds)]
    cells = []
    for limit in LIMITS:
        rows = [crowd.run(crowd.policies(limit), seed) for seed in range(seeds)]
        cell: dict[str, Any] = {"kind": crowd.kind, "alpha": crowd.alpha, "limit": limit}
        for name in METRICS[crowd.kind]:
            pairs = zip(rows, defaults, strict=True)
            cell[name] = interval([row[name] - other[name] for row, other in pairs])
            cell[name]["value"] = sum(row[name] for row in rows) / seeds
        cells.append(cell)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, choices=(5, 10, 20, 30), default=20)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    for hardware, adapters in ADAPTERS.items():
        crowds = [Crowd(hardware, *chosen) for chosen in product(METRICS, ALPHAS)]
        config = {
            "seeds": arguments.seeds,
            "hardware": hardware.name,
            "adapters": adapters,
            "rate": hardware.rate,
            "seconds": SECONDS,
            "ttft_slo_s": TTFT_S,
            "default_limit": LORRY.cluster_adapters,
        }
        with ProcessPoolExecutor(arguments.processes) as pool:
            runs = pool.map(measured, crowds, repeat(arguments.seeds))
            found = list(track(runs, description=hardware.name, total=len(crowds)))
        write_study("clustering", config, {"cells": list(chain(*found))}, part=hardware.name)


if __name__ == "__main__":
    main()
