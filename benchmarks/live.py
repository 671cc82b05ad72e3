"""What the router's policies do before a real GPU: load below and above what it can serve.

    python -m benchmarks.live --model llama-3-8b --adapters 1000

Store, worker and router are the real processes with their default policies; weights are random, and
so are the adapters, which come from the store's `dummy:` backend. First every adapter is asked for
once, so that its page image is in the store's memory. Then come requests that have to wait for no
one, and as many at once as show what can be served when it never idles: the capacity, from the
second to the fourth fifth of their ends. Then an open loop at shares of it, each request with the
objective, popularity by Zipf's law. Beside the result file lies a page of each load, as
`lorry bench` writes it.

The router and the load share the machine's CPUs with the worker's host side: the result tells how
busy the router was.
"""

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.building import device_name
from benchmarks.open_loop import send
from benchmarks.prediction_error import PredictionError
from benchmarks.results_file import RESULTS, write_result
from benchmarks.served import Served, ServedOptions, native_layout, served, tokenized_model
from lorry.client.bench.lengths import parse_lengths
from lorry.client.bench.load import TokenRange
from lorry.client.bench.record import Record, Slo
from lorry.client.bench.report import report
from lorry.client.bench.summary import percentiles, summary
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace
from lorry.rpc.base_model import read_base_model
from tests.support.scrape import metrics_url, scrape

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
BUILDERS = 8  # processes of the store that make page images
ALONE = 20  # requests that wait for no one
FLOOD_RATE = 1e4
FIRST_TOKEN = 3
OF_TENANTS = ("tenants", "fairness")  # there is but one
CONFIG = (
    *("model", "device", "adapters", "rank", "alpha", "loads", "seconds", "capacity_requests"),
    *("prompt_tokens", "output_tokens", "slo_ttft_s", "slo_tpot_s", "seed", "processes"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """One open loop and what came of it."""

    share: float  # of the capacity
    records: list[Record]
    metrics: dict[str, Any]


class Measurement:
    """Loads one router."""

    def __init__(self, arguments: argparse.Namespace, services: Served, vocab_size: int) -> None:
        self._arguments, self._services = arguments, services
        self._adapters = [f"adapters/dummy-{n}" for n in range(arguments.adapters)]
        self._tokens = TokenRange(FIRST_TOKEN, vocab_size - 1)
        self._slo = Slo(arguments.slo_ttft_s, arguments.slo_tpot_s)
        self._metrics_url = metrics_url(services.log("router"))

    async def warm_up(self) -> None:
        """Ask for every adapter once."""
        every_s = 1 / self._arguments.warm_up_rate
        every = [TraceRequest(n * every_s, n, 8, 2) for n in range(self._arguments.adapters)]
        self._check(await self._send(every, Slo()))

    async def alone_ttft_s(self) -> float:
        """The median of requests that come one by one."""
        records = list[Record]()
        for number, request in enumerate(self._trace(ALONE, 1.0)):
            one = TraceRequest(0.0, request.adapter, request.prompt_tokens, 2)
            records += await self._send([one], Slo())
            assert records[number].ok, records[number]
        return statistics.median(record.ttft_s or 0.0 for record in records)

    async def capacity_req_per_s(self) -> float:
        """What is served when nothing ever idles."""
        trace = self._trace(self._arguments.capacity_requests, FLOOD_RATE)
        records = self._check(await self._send(trace, Slo()))
        ends_s = sorted(record.ended_s or 0.0 for record in records)
        first, last = len(ends_s) // 5, len(ends_s) * 4 // 5
        return (last - first) / (ends_s[last] - ends_s[first])

    async def load(self, share: float, capacity: float) -> Load:
        rate, seconds = share * capacity, self._arguments.seconds
        before, router_s = await scrape(self._metrics_url), self._router_cpu_s()
        records = await self._send(self._trace(max(1, round(rate * seconds)), rate), self._slo)
        router_s = self._router_cpu_s() - router_s
        after = await scrape(self._metrics_url)
        metrics = {k: v for k, v in summary(records).items() if k not in OF_TENANTS}
        aborted = [record for record in records if record.reason == "SLO_UNATTAINABLE"]
        return Load(
            share,
            records,
            metrics
            | {
                "load": share,
                "offered_req_per_s": rate,
                "aborted": len(aborted) / len(records),
                "abort_wait_s": percentiles(record.latency_s for record in aborted),
                "ttft_prediction_error": PredictionError.between(before, after).metrics(),
                "router_cpu_share": router_s / metrics["seconds"],
            },
        )

    def _trace(self, requests: int, rate: float) -> list[TraceRequest]:
        arguments = self._arguments
        return make_trace(
            TraceSpec(
                requests=requests,
                adapters=arguments.adapters,
                alpha=arguments.alpha,
                rate=rate,
                prompt_tokens=parse_lengths(arguments.prompt_tokens),
                output_tokens=parse_lengths(arguments.output_tokens),
                seed=arguments.seed,
            )
        )

    async def _send(self, trace: Sequence[TraceRequest], slo: Slo) -> list[Record]:
        return await send(
            self._services.endpoints.router,
            trace,
            slo,
            adapters=self._adapters,
            token_ids=self._tokens,
            processes=self._arguments.processes,
        )

    def _check(self, records: list[Record]) -> list[Record]:
        failed = {f"{record.code} {record.reason}" for record in records if not record.ok}
        assert not failed, f"requests without an objective failed: {failed}"
        return records

    def _router_cpu_s(self) -> float:
        return self._services.cpu_s("lorry.router")


async def measure(
    arguments: argparse.Namespace, directory: Path
) -> tuple[dict[str, Any], list[Load]]:
    model = tokenized_model(arguments.model, directory)
    vocab_size = read_base_model(model).vocab_size
    async with served(_options(arguments, model), directory) as services:
        measurement = Measurement(arguments, services, vocab_size)
        await measurement.warm_up()
        alone_s = await measurement.alone_ttft_s()
        capacity = await measurement.capacity_req_per_s()
        print(f"alone {alone_s * 1e3:.1f} ms, capacity {capacity:.2f} requests/s", flush=True)
        loads = list[Load]()
        for share in arguments.loads:
            loads.append(await measurement.load(share, capacity))
            _print(loads[-1].metrics)
    metrics = {
        "alone_ttft_s": alone_s,
        "capacity_req_per_s": capacity,
        "loads": [load.metrics for load in loads],
    }
    return metrics, loads


def _options(arguments: argparse.Namespace, model: Path) -> ServedOptions:
    layout = native_layout(read_base_model(model), arguments.device)
    one_bytes = layout.pages(TARGETS, arguments.rank) * layout.page_bytes
    modules = ",".join(TARGETS)
    return ServedOptions(
        model=model,
        device=arguments.device,
        backend=f"dummy:{arguments.adapters}?ranks={arguments.rank}&modules={modules}",
        ram_bytes=(arguments.adapters + BUILDERS) * one_bytes,
        store=["--builders", str(BUILDERS)],
        worker=arguments.worker_options,
    )


def _print(metrics: dict[str, Any]) -> None:
    milliseconds = {
        name: " ".join(f"{p} {value * 1e3:.0f}" for p, value in (metrics[key] or {}).items())
        for name, key in (
            *(("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("answer of an abort", "abort_wait_s")),
        )
    }
    print(
        f"load {metrics['load']:g}: {metrics['offered_req_per_s']:.2f} requests/s offered, "
        f"{metrics['requests']} in all; attainment {metrics['attainment']:.3f} (of admitted "
        f"{metrics['attainment_of_admitted']:.3f}), goodput {metrics['goodput_req_per_s']:.2f}/s, "
        f"aborted {metrics['aborted']:.3f}; errors {metrics['errors']}; "
        f"prediction error {metrics['ttft_prediction_error']}; "
        f"router {metrics['router_cpu_share']:.2f} CPU"
    )
    for name, values in milliseconds.items():
        print(f"  {name} ms: {values or '-'}", flush=True)


def write_reports(result_path: Path, result: dict[str, Any], loads: Sequence[Load]) -> None:
    """A page for each load, in a directory named like the result file."""
    directory = result_path.with_suffix("")
    directory.mkdir(parents=True, exist_ok=True)
    for load in loads:
        config = result["config"] | {"load": load.share}
        page = report(result | {"config": config, "metrics": summary(load.records)}, load.records)
        (directory / f"load-{load.share:g}.html").write_text(page)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--model", default="llama-3-8b", help="a directory of benchmarks/models")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--adapters", type=int, default=1000)
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--alpha", type=float, default=1.0, help="popularity; 0 is uniform")
    result.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.2, 2.0])
    result.add_argument("--seconds", type=float, default=45.0, help="of each load")
    result.add_argument("--capacity-requests", type=int, default=600)
    result.add_argument("--warm-up-rate", type=float, default=40.0, help="requests a second")
    result.add_argument("--prompt-tokens", default="8-1024", help="as `lorry bench` has it")
    result.add_argument("--output-tokens", default="8-256", help="likewise")
    result.add_argument("--slo-ttft-s", type=float, default=1.0)
    result.add_argument("--slo-tpot-s", type=float, default=0.1)
    result.add_argument("--seed", type=int, default=42, help="of the traces")
    result.add_argument("--processes", type=int, default=4, help="that send")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result files")
    result.add_argument("--commit", help="where the tree came without its history")
    result.add_argument("worker_options", nargs="*", help="after --, for the worker")
    return result


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="lorry-live-") as directory:
        metrics, loads = asyncio.run(measure(arguments, Path(directory)))
    config = {name: getattr(arguments, name) for name in CONFIG}
    path = write_result(
        f"live-{Path(arguments.model).name}",
        benchmark="live",
        device=device_name(arguments.device),
        config=config,
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )
    write_reports(path, json.loads(path.read_text()), loads)


if __name__ == "__main__":
    main()
