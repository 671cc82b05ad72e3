"""The cost model of a worker on one H200 with Llama-3-8B, fitted to committed results.

    python -m benchmarks.simulation.h200

What a step takes beside products and reads of memory, on the host and in small kernels, is fitted
to two runs of the engine: without adapters and with one. The others show how well it holds. All are
of one commit and one machine; newer runs leave what was simulated with them as it is.
"""

import argparse
import functools
import json
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.results_file import RESULTS, write_result
from benchmarks.roofline import GIB, MODELS
from benchmarks.simulation.costs import MeasuredCosts
from benchmarks.simulation.run import Setting, Simulation
from benchmarks.simulation.worker import PAGE_TOKENS, WorkerLimits
from lorry.client.bench.trace import TraceSpec, make_trace

DEVICE, MODEL, RANK = "NVIDIA H200", "llama-3-8b", 16
POOL_GIB = 108.0
ENGINE_RUNS = RESULTS / "simulated-engine"


@dataclass(frozen=True, slots=True)
class Comparison:
    adapters: int
    measured_req_per_s: float
    simulated_req_per_s: float
    measured_steps: int
    simulated_steps: int
    measured_loads: int
    simulated_loads: int

    @property
    def error(self) -> float:
        return self.simulated_req_per_s / self.measured_req_per_s - 1


def setting(*, other_ms: float, lora_ms: float) -> Setting:
    shape = MODELS[MODEL]
    page_bytes = PAGE_TOKENS * shape.kv_bytes
    return Setting(
        costs=MeasuredCosts(
            device=DEVICE, model=MODEL, step_tokens=1024, other_ms=other_ms, lora_ms=lora_ms
        ),
        limits=WorkerLimits(pool_pages=int(POOL_GIB * GIB / page_bytes), page_bytes=page_bytes),
        ranks=(RANK,),
        bytes_per_rank=shape.adapter_bytes_per_rank,
    )


@functools.cache
def fitted() -> Setting:
    """One worker as it was measured."""
    plain, one = engine_results()[0], engine_results()[1]
    free = offline(setting(other_ms=0.0, lora_ms=0.0), 0)
    steps = free.workers[0].counts.steps
    other_ms = (plain["seconds"] - free.clock.now_s) / steps * 1e3
    free = offline(setting(other_ms=other_ms, lora_ms=0.0), 1)
    return setting(other_ms=other_ms, lora_ms=(one["seconds"] - free.clock.now_s) / steps * 1e3)


def offline(setting: Setting, adapters: int) -> Simulation:
    """The engine benchmark's run: all requests at once."""
    trace = make_trace(TraceSpec(adapters=adapters))
    at_once = [replace(request, arrival_s=0.0) for request in trace]
    everything = replace(setting.limits, max_waiting=len(trace))
    simulation = Simulation(replace(setting, limits=everything), at_once)
    simulation.run()
    return simulation


def compare() -> list[Comparison]:
    """Each of the engine's runs beside the simulated one."""
    found = []
    for adapters, measured in engine_results().items():
        simulation = offline(fitted(), adapters)
        (worker,) = simulation.workers
        found.append(
            Comparison(
                adapters,
                measured["req_per_s"],
                len(simulation.router.records) / simulation.clock.now_s,
                measured["steps"],
                worker.counts.steps,
                measured["adapter_loads"],
                worker.adapters.num_loads,
            )
        )
    return found


def engine_results() -> dict[int, dict[str, Any]]:
    """Metrics of the offline runs by number of adapters."""
    results = [json.loads(path.read_text()) for path in ENGINE_RUNS.glob("engine-*.json")]
    found = {result["config"]["adapters"]: result["metrics"] for result in results}
    return dict(sorted(found.items()))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = compare()
    for row in rows:
        print(
            f"{row.adapters:5d} adapters: measured {row.measured_req_per_s:.2f} req/s in "
            f"{row.measured_steps} steps, simulated {row.simulated_req_per_s:.2f} in "
            f"{row.simulated_steps} ({row.error:+.1%}); loads {row.measured_loads}, "
            f"{row.simulated_loads}"
        )
    fields = ("adapters", "measured_req_per_s", "simulated_req_per_s", "error")
    write_result(
        "simulation-h200",
        benchmark="simulation.h200",
        device="virtual clock",
        config={"device": DEVICE, "model": MODEL, "rank": RANK},
        metrics={"runs": [{name: getattr(row, name) for name in fields} for row in rows]},
    )


if __name__ == "__main__":
    main()
