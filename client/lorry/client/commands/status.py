"""`lorry status`: whether each service takes requests, and what the worker holds."""

import asyncio
import sys
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from lorry.client.commands.connection import CONNECTION, DEFAULT, Connection
from lorry.client.console import complain, explain, is_unreachable, make_console, make_table
from lorry.client.probe import is_ready, worker_status
from lorry.client.routers import router_addresses
from lorry.rpc.channel import Credentials
from lorry.rpc.errors import LorryError
from lorry.v1.worker_service_pb2 import GetWorkerStatusResponse

PROBE_TIMEOUT_S = 5.0


async def status(
    *,
    worker: Annotated[str | None, Parameter(env_var="LORRY_WORKER", group=CONNECTION)] = None,
    connection: Connection = DEFAULT,
) -> None:
    """Show the health of each service and what the worker holds.

    Exits with 1 unless every service takes requests.

    Parameters
    ----------
    worker
        HOST:PORT of the worker; default: of the running `lorry up`, else 127.0.0.1:50053.
    """
    endpoints = connection.endpoints(worker=worker)
    services = [
        *(("router", address) for address in router_addresses(endpoints.router)),
        ("adapter store", endpoints.store),
        ("worker", endpoints.worker),
    ]
    credentials = connection.credentials()
    timeout_s = min(PROBE_TIMEOUT_S, connection.timeout_s)
    states = await asyncio.gather(
        *(_state(address, credentials, timeout_s) for _, address in services)
    )
    console = make_console()
    table = make_table("service", "address", "state")
    for (name, address), state in zip(services, states, strict=True):
        table.add_row(name, address, state)
    console.print(table)
    if states[-1] == "ready":
        console.print("", await _worker_details(endpoints.worker, credentials, timeout_s))
    if any(state != "ready" for state in states):
        complain("not everything takes requests (`lorry up` starts all services on this machine)")
        sys.exit(1)


async def _state(address: str, credentials: Credentials, timeout_s: float) -> str:
    try:
        return "ready" if await is_ready(address, credentials, timeout_s=timeout_s) else "not ready"
    except LorryError as error:
        return "not reachable" if is_unreachable(error) else explain(error)


async def _worker_details(address: str, credentials: Credentials, timeout_s: float) -> Table | str:
    try:
        return _worker_table(await worker_status(address, credentials, timeout_s=timeout_s))
    except LorryError as error:
        return f"worker: {explain(error)}"


def _worker_table(response: GetWorkerStatusResponse) -> Table:
    status, residency = response.status, response.residency
    table = make_table(f"worker {response.worker_id}", "")
    used = (
        f"{status.pages_kv} KV, {status.pages_adapter} adapters, "
        f"{status.pages_cached} kept prefixes, {status.pages_free} free"
    )
    table.add_row("requests", f"{status.running} running, {status.waiting} waiting")
    table.add_row("pages", f"{status.pages_total}: {used}")
    table.add_row(
        "adapters", f"{len(residency.gpu_added)} in the pool, {len(residency.host_added)} in memory"
    )
    table.add_row("most adapters in one step", str(status.max_adapters_in_step))
    if queried := status.prefix_query_tokens:
        share = status.prefix_hit_tokens / queried
        table.add_row("prefix cache", f"{share:.0%} of {queried} tokens found")
    table.add_row("prefill", f"{status.prefill_tokens_per_s:.0f} tokens/s")
    if status.draining:
        table.add_row("draining", "takes no new requests")
    return table
