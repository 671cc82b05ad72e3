"""Writes docs/metrics.md from the services' tables of metrics: `make docs`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorry.adapter_store.metrics import METRICS as STORE
from lorry.router.metrics import METRICS as ROUTER
from lorry.rpc.call_counts import call_metrics
from lorry.rpc.metrics import Metric
from lorry.worker.metrics import METRICS as WORKER

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
SERVICES: dict[str, Sequence[Metric[Any]]] = {
    "Router": (*ROUTER, *call_metrics("lorry_router")),
    "Worker": (*WORKER, *call_metrics("lorry_worker")),
    "Adapter store": (*STORE, *call_metrics("lorry_store")),
}
INTRODUCTION = """# Metrics

<!-- Written by `make docs` from the services' tables of metrics. -->

Each service has a port of its own for Prometheus, `http://HOST:PORT/metrics`: by default on
127.0.0.1, at the port of `--address` plus 1000, so 51051 for the router, 51052 for the adapter
store and 51053 for a worker. `--metrics-address HOST:PORT` chooses another one, port 0 a free one,
which is logged; empty, there is none. Other machines are served only with `--tls`, by HTTPS, where
callers must show a certificate to one that shows it too, or with `--insecure`.

Units are seconds, bytes, tokens and pages. No label holds an adapter, a version or any text of a
peer, so the number of series does not grow with what is served: `code` and `reason` are those of
the [table of errors](faults.md#errors) (empty where there is none), `method` is a method of the
protocol, and `worker` an address that the router looks for workers at. Objectives alone are counted
by tenant, for those that the router's tenants file names, and by at most 32 values of the one label
of requests that the deployment chooses. What one adapter or another tenant does is in the logs.

The worker's metrics of steps, pages and loads are the engine's and at most a second old. Counters
begin at zero with their process. Beside these there are the `process_*` metrics of Prometheus's
client library, for the CPU time, memory and files of each service, and, named
`lorry_worker_engine_process_*`, of the worker's engine.

`deploy/prometheus.yml` is a scrape configuration, which `docker compose --profile metrics up` uses,
and `deploy/dashboard.json` a dashboard for Grafana.
"""


def page() -> str:
    return "\n".join([INTRODUCTION, *(line for name in SERVICES for line in _section(name))])


def _section(name: str) -> Iterator[str]:
    yield f"## {name}\n"
    yield "| Metric | Type | Labels | Meaning |"
    yield "|---|---|---|---|"
    for metric in SERVICES[name]:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}` | {metric.kind.value} | {labels} | {metric.help} |"
    yield ""


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
