"""How long the simulator takes for a large deployment: 100 workers, a million requests.

python -m benchmarks.studies.scale
"""

import argparse
import time
from dataclasses import replace

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from benchmarks.simulation import h200
from benchmarks.simulation.run import Simulation
from benchmarks.studies.common import LORRY, figures, write_study
from lorry.client.bench.record import Slo
from lorry.client.bench.trace import TraceSpec, make_trace

REQ_PER_S = 40.0  # of each worker: about 0.8 of what it can do
SHOWN_REQUESTS = 1000  # between two updates of the progress bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    arguments = parser.parse_args()
    setting = replace(
        h200.fitted(), num_workers=arguments.workers, options=LORRY, slo=Slo(ttft_s=1.0)
    )
    trace = make_trace(
        TraceSpec(
            requests=arguments.requests,
            adapters=arguments.adapters,
            rate=REQ_PER_S * arguments.workers,
        )
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("requests", total=arguments.requests)

        def show(ended: int) -> None:
            if ended % SHOWN_REQUESTS == 0:
                bar.update(task, completed=ended)

        simulation = Simulation(setting, trace, on_progress=show)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        records = simulation.run()
        seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    simulation.router.check_integrity()
    metrics = figures(records) | {
        "seconds": seconds,
        "cpu_seconds": cpu_s,
        "virtual_seconds": simulation.clock.now_s,
        "events": simulation.clock.num_events,
        "steps": sum(worker.counts.steps for worker in simulation.workers),
    }
    write_study("scale", vars(arguments), metrics)


if __name__ == "__main__":
    main()
