"""Fits the cost of S-LoRA's steps to its recorded runs by first come, first served.

    python -m benchmarks.simulation.fit_slora

Four coefficients on each of two GPUs, by a random search that narrows; the recorded runs of other
policies take no part and are a prediction.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.results_file import write_result
from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.slora import SLora, SLoraSetting
from benchmarks.simulation.slora_recorded import (
    A10G_S2,
    A100_S4,
    FCFS_RUNS,
    Hardware,
    Recorded,
    recorded_trace,
)
from lorry.client.bench.record import Record

# What a difference of one counts as: two per cent of throughput, half of a time, 5 points.
RATE_TOLERANCE, TIME_TOLERANCE, ATTAINMENT_TOLERANCE = 0.02, math.log(1.5), 0.05
LOAD_S_PER_RANK = 2 * (2 << 20) / 12e9  # each adapter is copied twice, over PCIe 4
FIRST_GUESS = {
    A10G_S2: LinearCosts(step_ms=30.0, row_ms=0.24, kv_token_ms=0.00095, rank_ms=0.008),
    A100_S4: LinearCosts(step_ms=30.0, row_ms=0.112, kv_token_ms=0.00055, rank_ms=0.004),
}


def setting_of(hardware: Hardware, costs: LinearCosts) -> SLoraSetting:
    return SLoraSetting(
        costs=costs,
        pool_tokens=hardware.pool_tokens,
        ranks=hardware.ranks,
        load_s_per_rank=LOAD_S_PER_RANK,
    )


def figures(records: list[Record]) -> dict[str, float]:
    """As S-LoRA reports them: throughput with the drain, means of times."""
    first = [record.ttft_s for record in records if record.ttft_s is not None]
    served = [record.latency_s for record in records if record.ok]
    return {
        "req_per_s": len(served) / max(r.ended_s or 0.0 for r in records),
        "ttft_s": float(np.mean(first)),
        "latency_s": float(np.mean([latency for latency in served if latency is not None])),
        "attainment": float(np.mean([record.met_slo for record in records])),
        "satisfaction": float(np.mean([record.satisfaction for record in records])),
    }


def simulated(hardware: Hardware, costs: LinearCosts, run: Recorded) -> dict[str, float]:
    trace = recorded_trace(run.adapters, run.rate)
    return figures(SLora(setting_of(hardware, costs), "fcfs").run(trace))


def residuals(hardware: Hardware, costs: LinearCosts) -> Iterator[float]:
    """Each difference in units of its tolerance."""
    for run in FCFS_RUNS[hardware]:
        found = simulated(hardware, costs, run)
        yield math.log(found["req_per_s"] / run.req_per_s) / RATE_TOLERANCE
        for name in ("ttft_s", "latency_s"):
            if (recorded := getattr(run, name)) is not None:
                yield math.log(found[name] / recorded) / TIME_TOLERANCE
        if run.attainment is not None:
            yield (found["attainment"] - run.attainment) / ATTAINMENT_TOLERANCE


def loss(hardware: Hardware, costs: LinearCosts) -> float:
    return sum(residual**2 for residual in residuals(hardware, costs))


def fit(hardware: Hardware, tries: int) -> tuple[LinearCosts, float]:
    """The best of random steps from the best so far, ever shorter ones."""
    random = np.random.RandomState(0)
    best = FIRST_GUESS[hardware]
    least = loss(hardware, best)
    for number in range(tries):
        width = 0.3 * (1 - number / tries) + 0.02
        factors = np.exp(random.normal(0, width, 4) * random.randint(0, 2, 4))
        values = [
            value * factor for value, factor in zip(asdict(best).values(), factors, strict=True)
        ]
        costs = LinearCosts(**dict(zip(asdict(best), values, strict=True)))
        found = loss(hardware, costs)
        if found < least:
            best, least = costs, found
            print(f"{hardware.name} {number}: {least:.2f} {best}", flush=True)
    return best, least


def report(hardware: Hardware, costs: LinearCosts) -> list[Mapping[str, Any]]:
    """Recorded and simulated side by side."""
    return [
        {"recorded": asdict(run), "simulated": simulated(hardware, costs, run)}
        for run in FCFS_RUNS[hardware]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=150)
    parser.add_argument("--hardware", nargs="+", default=[A10G_S2.name, A100_S4.name])
    arguments = parser.parse_args()
    for hardware in (A10G_S2, A100_S4):
        if hardware.name in arguments.hardware:
            costs, least = fit(hardware, arguments.tries)
            write_result(
                f"simulation-slora-fit-{hardware.name}",
                benchmark="simulation.fit_slora",
                device="virtual clock",
                config={"hardware": hardware.name, "tries": arguments.tries},
                metrics={
                    "costs": asdict(costs),
                    "loss": least,
                    "runs": report(hardware, costs),
                },
            )


if __name__ == "__main__":
    main()
