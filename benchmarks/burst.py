"""A burst at three times what three CPU workers can do: who was admitted is served in time.

    python -m benchmarks.burst

Real services: a store, a router and three workers of one thread each, with the demo's model and its
adapters. The objective is ten times the median time to first token of requests that come alone.
Before and after the burst the load is light; at the end nothing is left anywhere.

The services and the load share the machine's CPUs, which the workers alone would fill. In service
router and clients have CPUs of their own; here the workers give way to them, by nice(1). On two
CPUs requests would else lie up to 0.8 s before the router has read them, whatever it then decides.
The result tells how many CPUs there are and how many processes wanted one before the run; a figure
counts only where those are next to none.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import open_loop
from benchmarks.results_file import write_result
from demo.paths import adapter_dir
from demo.tasks import TASKS
from lorry.client import Client, Request
from lorry.client.bench.lengths import Uniform
from lorry.client.bench.load import TokenRange
from lorry.client.bench.record import Record, Slo
from lorry.client.bench.summary import percentiles, summary
from lorry.client.bench.trace import Burst, TraceRequest, TraceSpec, make_trace
from lorry.client.probe import worker_status
from tests.support.processes import DEMO_MODEL, Service, ready

WORKERS = 3
NICENESS = 10  # of the workers
TOKENS = TokenRange(3, 30)
PROMPT, OUTPUT = Uniform(4, 24), Uniform(8, 40)
ALONE = 30  # requests that come alone
SLO_FACTOR = 10
MOST_BUSY = 0.25  # processes per CPU, of others
LIGHT = 0.3  # of what the workers can do, beside the burst


@contextlib.asynccontextmanager
async def services(directory: Path) -> AsyncIterator[tuple[Service, Service, list[Service]]]:
    """Router, store and workers, ready; they are stopped on every exit."""
    model = ["--model", str(DEMO_MODEL), "--metrics-address", ""]
    shm = ["--shm-dir", str(directory / "shm")]
    backend = f"file://{directory / 'adapters'}"
    store = Service("adapter_store", directory / "store.log", *model, *shm, "--backend", backend)
    started = [store]
    try:
        await store.start()
        options = [*model, *shm, "--threads", "1", "--store", store.address]
        workers = [
            Service("worker", directory / f"worker-{n}.log", *options, niceness=NICENESS)
            for n in range(WORKERS)
        ]
        for worker in workers:
            started.append(worker)
            await worker.start()
        names = [part for worker in workers for part in ("--worker", worker.address)]
        router = Service(
            "router",
            directory / "router.log",
            *[*model, "--store", store.address, *names],
        )
        started.append(router)
        await router.start()
        for service in started:
            await ready(service.address)
        yield router, store, workers
    finally:
        for service in reversed(started):
            service.kill()
            await service.wait()


async def send(router: Service, trace: Sequence[TraceRequest], slo: Slo) -> list[Record]:
    """Send the trace, for the demo's adapters."""
    adapters = [f"adapters/{name}" for name in TASKS]
    return await open_loop.send(router.address, trace, slo, adapters=adapters, token_ids=TOKENS)


async def alone_ttft_s(router: Service) -> float:
    """The median time to first token of requests one after another."""
    times = []
    async with Client(router=router.address) as client:
        for number, name in zip(range(ALONE), list(TASKS) * ALONE, strict=False):
            prompt = TOKENS.prompt(14, number)
            request = Request(prompt=prompt, adapter=name, max_tokens=4, ignore_eos=True)
            sent_s = time.perf_counter()
            async with client.stream(request) as stream:
                await anext(stream)
                times.append(time.perf_counter() - sent_s)
    return statistics.median(times)


async def capacity_req_per_s(router: Service, requests: int) -> float:
    """What the workers do when they are never idle."""
    spec = TraceSpec(
        requests=requests, adapters=len(TASKS), rate=1e4, prompt_tokens=PROMPT, output_tokens=OUTPUT
    )
    records = await send(router, make_trace(spec), Slo())
    assert all(record.ok for record in records)
    return len(records) / max(record.ended_s or 0.0 for record in records)


async def measure(directory: Path, seconds: float) -> dict[str, Any]:
    async with services(directory) as (router, store, workers):
        async with Client(router=router.address, store=store.address) as client:
            for name in TASKS:
                await client.adapters.push(adapter_dir(name), adapter_id=name)
        await alone_ttft_s(router)  # every worker has met every adapter
        alone_s, capacity = await alone_ttft_s(router), await capacity_req_per_s(router, 100)
        light = LIGHT * capacity
        burst = Burst(seconds, seconds, 3.0 / LIGHT)
        spec = TraceSpec(
            requests=int(2 * light * seconds + 3 * capacity * seconds),
            adapters=len(TASKS),
            rate=light,
            prompt_tokens=PROMPT,
            output_tokens=OUTPUT,
            bursts=(burst,),
        )
        slo = Slo(ttft_s=SLO_FACTOR * alone_s)
        records = await send(router, make_trace(spec), slo)
        await asyncio.sleep(1.5)  # the workers' next statuses
        left = [(await worker_status(w.address, timeout_s=10)).status for w in workers]
    refused = [record for record in records if not record.ok]
    figures = summary(records)
    return {
        "alone_ttft_s": alone_s,
        "capacity_req_per_s": capacity,
        "ttft_slo_s": slo.ttft_s,
        "requests": len(records),
        "admitted": figures["served"],
        "errors": figures["errors"],
        "attainment_of_admitted": figures["attainment_of_admitted"],
        "attainment": figures["attainment"],
        "goodput_req_per_s": figures["goodput_req_per_s"],
        "ttft_s": figures["ttft_s"],
        "wait_for_abort_s": percentiles(record.latency_s for record in refused),
        "running_afterwards": sum(status.running + status.waiting for status in left),
        "kv_pages_afterwards": sum(status.pages_kv for status in left),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each of the three phases")
    arguments = parser.parse_args()
    cpus, busy = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if busy > MOST_BUSY * cpus:
        print(f"{busy:.1f} processes already want the {cpus} CPUs: the figures will mean little")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the services are stopped then, too
    with tempfile.TemporaryDirectory(prefix="lorry-burst-") as directory:
        metrics = asyncio.run(measure(Path(directory), arguments.seconds))
    write_result(
        "burst",
        benchmark="burst",
        device=f"{platform.machine()} CPU",
        config={
            "seconds": arguments.seconds,
            "workers": WORKERS,
            "worker_niceness": NICENESS,
            "cpus": cpus,
            "load_before": round(busy, 2),
        },
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
