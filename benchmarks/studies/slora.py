"""S-LoRA's study of early abort (its figure 10): its loop and Lorry's policies at equal costs.

    python -m benchmarks.studies.slora

The recorded runs are repeated with S-LoRA's loop and generator. Then, over paired seeds, four
schedulers serve the same traces at the same costs: S-LoRA's own loop, which knows how long outputs
get; S-LoRA's rule of early abort in Lorry's router before Lorry's worker, which does not; Lorry's
policies there; and one that knows the whole trace before it begins. Beside them is a bound of what
any schedule could do that preempts nobody.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Any

from rich.progress import track

from benchmarks.results_file import RESULTS
from benchmarks.simulation.bound import most_within_slo
from benchmarks.simulation.clairvoyant import clairvoyant
from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.fit_slora import setting_of
from benchmarks.simulation.run import Setting, Simulation, simulate
from benchmarks.simulation.slora import TTFT_S, SLora
from benchmarks.simulation.slora_recorded import (
    A10G_S2,
    A100_S4,
    CVS,
    POLICIES,
    Hardware,
    recorded_trace,
)
from benchmarks.simulation.worker import PAGE_TOKENS, WorkerLimits
from benchmarks.studies.common import LORRY, SLORA, figures, interval, write_study
from lorry.client.bench.record import Slo
from lorry.client.bench.trace import TraceRequest
from lorry.router.policy_options import PolicyOptions

TOKEN_BYTES = {A10G_S2: 512 << 10, A100_S4: 800 << 10}  # of KV cache, Llama 7B and 13B
LOAD_BYTES_PER_S = 12e9
METRICS = ("attainment", "satisfaction", "goodput_req_per_s")
BOUNDED = ("attainment", "goodput_req_per_s")


def fitted_costs(hardware: Hardware) -> LinearCosts:
    path = RESULTS / f"simulation-slora-fit-{hardware.name}.json"
    return LinearCosts(**json.loads(path.read_text())["metrics"]["costs"])


def worker_setting(hardware: Hardware, options: PolicyOptions) -> Setting:
    """Lorry's worker with the memory and the costs of S-LoRA's."""
    token_bytes = TOKEN_BYTES[hardware]
    return Setting(
        costs=fitted_costs(hardware),
        limits=WorkerLimits(
            pool_pages=hardware.pool_tokens // PAGE_TOKENS,
            page_bytes=PAGE_TOKENS * token_bytes,
            load_bytes_per_s=LOAD_BYTES_PER_S,
        ),
        ranks=hardware.ranks,
        bytes_per_rank=4 * token_bytes,  # q, k, v and o take a token's place for each rank
        options=options,
        slo=Slo(ttft_s=TTFT_S),
    )


def own_loop(hardware: Hardware, policy: Any, trace: Sequence[TraceRequest]) -> dict[str, Any]:
    return figures(SLora(setting_of(hardware, fitted_costs(hardware)), policy).run(trace))


def repeated(hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Each recorded cell beside the simulated one."""
    for policy, recorded in POLICIES[hardware].items():
        for index, cv in enumerate(CVS):
            trace = recorded_trace(hardware.adapters, hardware.rate, cv=cv)
            found = own_loop(hardware, policy, trace)
            yield {
                "policy": policy,
                "cv": cv,
                "recorded": {name: values[index] for name, values in recorded.items()},
                "simulated": {name: found[name] for name in METRICS},
            }


def bound(setting: Setting, costs: LinearCosts, trace: Sequence[TraceRequest]) -> dict[str, float]:
    """A run ends no sooner than its last request comes."""
    most = most_within_slo(setting, costs, trace)
    return {"attainment": most / len(trace), "goodput_req_per_s": most / trace[-1].arrival_s}


def compared(hardware: Hardware, cv: float, seeds: int) -> dict[str, Any]:
    """Means by scheduler, and the paired differences of Lorry to the others."""
    runs: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("own-loop", "slora", "lorry", "clairvoyant", "bound")
    }
    num_requests = num_preemptions = 0
    for seed in range(seeds):
        trace = recorded_trace(hardware.adapters, hardware.rate, cv=cv, seed=seed)
        runs["own-loop"].append(own_loop(hardware, "abort", trace))
        runs["slora"].append(figures(simulate(worker_setting(hardware, SLORA), trace)))
        setting = worker_setting(hardware, LORRY)
        lorry = Simulation(setting, trace)
        runs["lorry"].append(figures(lorry.run()))
        num_requests += len(trace)
        num_preemptions += lorry.workers[0].counts.preemptions
        costs = fitted_costs(hardware)
        runs["clairvoyant"].append(figures(clairvoyant(setting, costs, trace)))
        runs["bound"].append(bound(setting, costs, trace))
    return {
        "cv": cv,
        "preempted": num_preemptions / num_requests,
        "means": {
            name: {metric: sum(row[metric] for row in rows) / seeds for metric in metrics_of(name)}
            for name, rows in runs.items()
        },
        "differences": {
            other: {
                metric: interval(
                    [
                        mine[metric] - theirs[metric]
                        for mine, theirs in zip(runs["lorry"], runs[other], strict=True)
                    ]
                )
                for metric in metrics_of(other)
            }
            for other in ("own-loop", "slora", "clairvoyant", "bound")
        },
    }


def metrics_of(scheduler: str) -> Sequence[str]:
    return BOUNDED if scheduler == "bound" else METRICS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hardware", nargs="+", default=[A10G_S2.name, A100_S4.name])
    arguments = parser.parse_args()
    for hardware in (A10G_S2, A100_S4):
        if hardware.name not in arguments.hardware:
            continue
        cells = list(repeated(hardware))
        with ProcessPoolExecutor(arguments.processes) as pool:
            runs = pool.map(compared, repeat(hardware), CVS, repeat(arguments.seeds))
            compare = list(track(runs, description=hardware.name, total=len(CVS)))
        write_study(
            "slora",
            {"seeds": arguments.seeds, "ttft_slo_s": TTFT_S, "hardware": hardware.name},
            {"recorded": cells, "compared": compare},
            part=hardware.name,
        )


if __name__ == "__main__":
    main()
