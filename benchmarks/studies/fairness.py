"""What a greedy tenant does to another, and how backlogged tenants share by weight.

python -m benchmarks.studies.fairness
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.progress import track

from benchmarks.simulation import h200
from benchmarks.simulation.run import Setting, Simulation
from benchmarks.studies.common import LORRY, write_study
from lorry.client.bench.record import Record
from lorry.client.bench.summary import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, percentiles
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace, merged
from lorry.router.policy_options import PolicyOptions

MODEST_REQ_PER_S = 2.0
GREED = 100  # times as many requests
CAPACITY_REQ_PER_S = 50.0
ADAPTERS = 20  # of each tenant
WARM_UP_S = 5.0
COMPARED = {
    "all": LORRY,
    "places": replace(LORRY, fairness_step_share=1e9),
    "turns": replace(LORRY, fairness_reserve=0.0),
    "none": replace(LORRY, fairness="none"),
}


def one_tenant(name: str, rate: float, seconds: float, seed: int) -> list[TraceRequest]:
    spec = TraceSpec(
        requests=int(rate * seconds),
        adapters=ADAPTERS,
        rate=rate,
        tenants={name: 1.0},
        seed=seed,
    )
    return make_trace(spec)


def run(options: PolicyOptions, trace: Sequence[TraceRequest], **weights: float) -> Simulation:
    setting: Setting = replace(h200.fitted(), options=options, weights=weights)
    simulation = Simulation(setting, trace)
    simulation.run()
    return simulation


def ttfts_of(simulation: Simulation, tenant: str) -> list[float | None]:
    """Of those that came after the first seconds, when both tenants have been seen."""
    return [
        record.ttft_s
        for record in simulation.router.records
        if record.planned.tenant == tenant and record.planned.arrival_s >= WARM_UP_S
    ]


def beside(
    options: PolicyOptions, other_req_per_s: float, seconds: float, seeds: int
) -> dict[str, Any]:
    """A modest tenant's times to first token, and what the worker serves of the other while it
    comes."""
    ttfts, served = list[float | None](), 0
    for seed in range(seeds):
        modest = one_tenant("modest", MODEST_REQ_PER_S, seconds, 1 + seed)
        other = one_tenant("other", other_req_per_s, seconds, 1000 * (1 + seed))
        simulation = run(options, merged(modest, other))
        ttfts += ttfts_of(simulation, "modest")
        served += served_by(simulation.router.records, "other", seconds)
    return {"ttft_s": percentiles(ttfts), "other_req_per_s": served / seconds / seeds}


def served_by(records: Sequence[Record], tenant: str, until_s: float) -> int:
    return sum(
        record.planned.tenant == tenant and (record.ended_s or until_s) < until_s
        for record in records
    )


def greedy(options: PolicyOptions, seconds: float, seeds: int) -> dict[str, Any]:
    """Beside a tenant that leaves a tenth of the worker, and beside one that wants four of it."""
    rates = {"load": 0.9 * CAPACITY_REQ_PER_S, "greedy": GREED * MODEST_REQ_PER_S}
    return {name: beside(options, rate, seconds, seeds) for name, rate in rates.items()}


def lone(options: PolicyOptions, seconds: float) -> float:
    """What a tenant gets that wants four times the worker and is alone, requests/s."""
    trace = one_tenant("other", GREED * MODEST_REQ_PER_S, seconds, 1000)
    return served_by(run(options, trace).router.records, "other", seconds) / seconds


def service(records: Sequence[Record], tenant: str, until_s: float) -> float:
    """Virtual tokens of what a tenant's requests got by then; an output's in proportion to time."""
    total = 0.0
    for record in records:
        if record.planned.tenant != tenant or (record.first_token_s or until_s) >= until_s:
            continue
        assert record.first_token_s is not None
        assert record.last_token_s is not None
        lasted_s = record.last_token_s - record.first_token_s
        share = min(1.0, (until_s - record.first_token_s) / lasted_s) if lasted_s else 1.0
        total += PROMPT_TOKEN_COST * record.planned.prompt_tokens
        total += OUTPUT_TOKEN_COST * record.output_tokens * share
    return total


def weighted(options: PolicyOptions, seconds: float) -> dict[str, float]:
    """Two tenants with weights 1 and 3 who both send twice what the worker can do."""
    traces = [one_tenant(name, 100.0, seconds, seed) for name, seed in (("one", 1), ("three", 2))]
    simulation = run(options, merged(*traces), one=1.0, three=3.0)
    records = simulation.router.records
    # From when the batch has filled, while both have a backlog.
    start_s, end_s = 0.4 * seconds, 0.95 * seconds
    got = {
        name: service(records, name, end_s) - service(records, name, start_s)
        for name in ("one", "three")
    }
    return got | {"ratio": got["three"] / got["one"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    seconds, seeds = arguments.seconds, arguments.seeds
    metrics = {
        "greedy": {
            name: greedy(options, seconds, seeds) for name, options in track(COMPARED.items())
        },
        "lone_req_per_s": {name: lone(COMPARED[name], seconds) for name in ("all", "turns")},
        "weighted": weighted(LORRY, seconds),
    }
    config = vars(arguments) | {"modest_req_per_s": MODEST_REQ_PER_S, "greed": GREED}
    write_study("fairness", config, metrics)


if __name__ == "__main__":
    main()
