"""A run from its workload to its files."""

import asyncio
import dataclasses
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lorry.client.bench.load import TokenRange
from lorry.client.bench.messages import Share
from lorry.client.bench.processes import run_parts, split
from lorry.client.bench.progress import LiveProgress
from lorry.client.bench.record import Record
from lorry.client.bench.report import facts, report
from lorry.client.bench.summary import summary
from lorry.client.bench.trace import TraceRequest
from lorry.client.client import Client
from lorry.client.console import make_table

if TYPE_CHECKING:
    from lorry.client.commands.bench import RunOptions, TraceOptions
    from lorry.client.commands.connection import Connection


class Run:
    def __init__(
        self, connection: "Connection", options: "RunOptions", trace: "TraceOptions"
    ) -> None:
        self._connection = connection
        self._options = options
        self._config = dataclasses.asdict(trace) | dataclasses.asdict(options)
        self._endpoints = connection.endpoints()
        self._tokens = options.tokens()

    async def list_adapters(self, tenant: str) -> list[str]:
        """Names of the tenant's adapters, as the store lists them."""
        async with Client(
            store=self._endpoints.store,
            token=self._token(tenant),
            tls=self._connection.tls,
            timeout_s=self._connection.timeout_s,
        ) as client:
            return [adapter.name async for adapter in client.adapters.list()]

    async def send(
        self,
        trace: Sequence[TraceRequest],
        adapters: Mapping[str, list[str]],
        console: Console,
    ) -> dict[str, Any]:
        """Send all requests, write what came of them, and return the result file's content.

        `adapters` are the names by tenant.
        """
        options, progress = self._options, LiveProgress(console, len(trace))
        shares = split(self._share(trace, adapters), min(options.processes, len(trace)))
        with progress.live():
            await run_parts(shares, progress.note)
        records = sorted(progress.records, key=lambda record: record.index)
        metrics = summary(records, weights=options.weights())
        result = _result(self._config, metrics)
        await asyncio.to_thread(write_files, options.output, result, records)
        return result

    def _share(self, trace: Sequence[TraceRequest], adapters: Mapping[str, list[str]]) -> Share:
        """The whole run as one share."""
        slo, token_ids = self._options.slo(), TokenRange.parse(self._options.token_ids)
        return Share(
            router=self._endpoints.router,
            tokens={tenant: self._token(tenant) for tenant in adapters},
            tls=str(self._connection.tls) if self._connection.tls else None,
            adapters=dict(adapters),
            token_ids=(token_ids.low, token_ids.high),
            timeout_s=self._connection.timeout_s,
            max_open=self._options.max_open,
            records=[Record(index, planned, slo) for index, planned in enumerate(trace)],
        )

    def _token(self, tenant: str) -> str | None:
        return self._tokens.get(tenant, self._connection.token())


def write_files(directory: Path, result: Mapping[str, Any], records: list[Record]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = (json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
    (directory / "records.jsonl").write_text("".join(lines))
    (directory / "report.html").write_text(report(dict(result), records))


def run_summary(result: dict[str, Any]) -> Table:
    metrics = result["metrics"]
    table = make_table("result", "")
    for name, value in facts(metrics).items():
        table.add_row(name, value)
    for name, count in metrics["errors"].items():
        table.add_row(name, f"{count} requests")
    if metrics["send_delay_s"]:
        table.add_row("sent late by (p99)", f"{metrics['send_delay_s']['p99'] * 1e3:.1f} ms")
    return table


def _result(config: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """In the form of the committed results of benchmarks."""
    return {
        "benchmark": "bench",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": platform.node(),
        "versions": {"python": platform.python_version(), "lorry": version("lorry")},
        "command": " ".join(["lorry", *sys.argv[1:]]),
        "config": {name: str(v) if isinstance(v, Path) else v for name, v in config.items()},
        "metrics": metrics,
    }
