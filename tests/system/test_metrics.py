"""Metrics of the real services under load, after losses, and as they are documented."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from demo import tasks
from deploy import metrics_page
from lorry.client import Client, Request
from lorry.rpc.errors import (
    AdapterNotFound,
    ContextLengthExceeded,
    DeadlineExpired,
    LorryError,
)
from tests.support.command import REPO
from tests.support.processes import Service, Stack, ready
from tests.support.scrape import Scrape, metrics_url, scrape, scrape_until

ADAPTERS = ["reverse", "rot13", "double-letters"]
EVERYWHERE = ("--metrics-address", "127.0.0.1:0")

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    for service in services(stack):
        service.options += EVERYWHERE
    try:
        await stack.start()
        await ready(stack.router.address)
        async with stack.client() as client:
            for adapter in ADAPTERS:
                await client.adapters.push(REPO / "demo" / "adapters" / adapter)
        yield stack
    finally:
        await stack.stop()


def services(stack: Stack) -> tuple[Service, ...]:
    return stack.router, stack.worker, stack.store


def url(service: Service) -> str:
    return metrics_url(service.log.read_text())


def check_reconciled(found: Scrape, prefix: str) -> None:
    """What was received has ended or is in progress."""
    ended = found.value(f"{prefix}_requests_total")
    in_progress = found.value(f"{prefix}_requests_in_progress")
    assert found.value(f"{prefix}_requests_received_total") == ended + in_progress


def idle(prefix: str) -> Callable[[Scrape], bool]:
    return lambda found: not found.value(f"{prefix}_requests_in_progress")


async def tokens_of(client: Client, adapter: str, number: int) -> int:
    request = Request(
        prompt=tasks.make_prompt("lorry"), adapter=adapter, max_tokens=8 + number % 8, seed=number
    )
    return len((await client.generate(request, timeout_s=120)).token_ids)


async def leave(client: Client) -> None:
    """Take one chunk of a long answer, then go."""
    request = Request(prompt="a", max_tokens=200, ignore_eos=True)
    async with client.stream(request) as stream:
        async for _ in stream:
            break


async def fail(client: Client, error: type[LorryError], request: Request, **options: float) -> None:
    with pytest.raises(error):
        await client.generate(request, **options)


async def test_counters_reconcile_after_a_mixed_load(stack: Stack) -> None:
    router, worker, store = (url(service) for service in services(stack))
    async with stack.client() as client:
        unknown = Request(prompt="a", adapter="unknown")
        too_long = Request(prompt="a", max_tokens=1_000_000)
        late = Request(prompt="a", max_tokens=1000, ignore_eos=True)
        done = asyncio.gather(
            *(tokens_of(client, ["", *ADAPTERS][number % 4], number) for number in range(24))
        )
        others = asyncio.gather(
            *(leave(client) for _ in range(4)),
            *(fail(client, AdapterNotFound, unknown) for _ in range(3)),
            *(fail(client, ContextLengthExceeded, too_long) for _ in range(2)),
            fail(client, DeadlineExpired, late, timeout_s=2.0),
        )
        num_tokens = sum(await done)
        await others

    found = await scrape_until(router, idle("lorry_router"))
    requests = "lorry_router_requests_total"
    assert found.value(requests, code="OK") == 24
    assert found.value(requests, reason="ADAPTER_NOT_FOUND") == 3
    assert found.value(requests, reason="CONTEXT_LENGTH_EXCEEDED") == 2
    left = found.value(requests, code="CANCELLED") + found.value(requests, code="DEADLINE_EXCEEDED")
    assert left == 5
    assert found.value("lorry_router_requests_received_total") == 34
    check_reconciled(found, "lorry_router")
    drawn = found.value("lorry_router_output_tokens_total")
    assert drawn >= num_tokens + 4
    assert found.value("lorry_router_ttft_seconds_count") >= 24 + 4

    found = await scrape_until(worker, idle("lorry_worker"))
    check_reconciled(found, "lorry_worker")
    assert found.value("lorry_worker_requests_total", code="OK") == 24
    assert found.value("lorry_worker_output_tokens_total") >= drawn

    found = await scrape(store)
    assert found.value("lorry_store_adapters") == len(ADAPTERS)
    assert found.value("lorry_store_uploads_total", end="published") == len(ADAPTERS)
    assert found.value("lorry_store_image_lookups_total", state="absent") == len(ADAPTERS)
    assert found.value("lorry_store_leases") == found.value("lorry_store_ram_images") == 3
    assert found.value("lorry_store_ram_bytes") > 0


async def test_the_engine_reports_its_steps_pool_and_loads(stack: Stack) -> None:
    async with stack.client() as client:
        await asyncio.gather(*(tokens_of(client, name, 1) for name in ["", *ADAPTERS]))
    await stack.idle()
    found = await scrape(url(stack.worker))
    steps = found.value("lorry_worker_step_rows_count")
    assert steps > 0
    assert found.value("lorry_worker_eager_steps_total") == steps
    assert found.value("lorry_worker_graph_replays_total") == 0
    for name in ("seconds", "sequences", "adapters"):
        assert found.value(f"lorry_worker_step_{name}_count") == steps
    assert found.value("lorry_worker_step_seconds_count", kind="decode") > 0
    assert found.value("lorry_worker_step_seconds_count", kind="mixed") > 0
    rows = found.value("lorry_worker_step_rows_sum")
    assert rows >= found.value("lorry_worker_step_sequences_sum") > 0
    assert found.value("lorry_worker_step_adapters_sum") > 0

    status = await stack.worker_status()
    assert found.value("lorry_worker_pool_pages") == status.pages_total
    assert found.value("lorry_worker_pool_pages", use="adapter") == status.pages_adapter > 0

    loads, fetches = "lorry_worker_adapter_load_seconds_count", "lorry_worker_fetch_seconds_count"
    assert found.value(loads, source="shm") == found.value(fetches, source="shm") == 3
    assert found.value(loads, source="chunks") == found.value(fetches, source="chunks") == 0
    num_bytes = found.value("lorry_worker_adapter_load_bytes_total", source="shm")
    assert num_bytes == found.value("lorry_worker_fetch_bytes_total", source="shm") > 0
    assert found.value("lorry_worker_adapters", tier="gpu") == len(ADAPTERS)
    assert found.value("lorry_worker_engine_process_resident_memory_bytes") > 1e7

    given = await scrape(url(stack.store))
    assert given.value("lorry_store_fetches_total", transport="shm") == len(ADAPTERS)
    assert given.value("lorry_store_fetched_bytes_total", transport="shm") == num_bytes


async def test_what_is_exported_is_what_is_documented(stack: Stack) -> None:
    exported = set[str]()
    for service in services(stack):
        exported |= (await scrape(url(service))).names
    own = {name for name in exported if name.startswith("lorry_") and "_process_" not in name}
    documented = set(re.findall(r"^\| `(\w+)` \|", metrics_page.PAGE.read_text(), re.MULTILINE))
    assert own == documented
    assert exported - own == {name for name in exported if "process_" in name} != set()


async def test_counts_outlive_a_killed_worker(stack: Stack) -> None:
    router = url(stack.router)
    before = await scrape(router)
    async with stack.client() as client:
        long = Request(prompt="a", max_tokens=200, ignore_eos=True)
        running = asyncio.ensure_future(client.generate(long, timeout_s=120))
        await scrape_until(
            router, lambda s: s.value("lorry_router_requests_in_progress", state="streaming")
        )
        address = stack.worker.address
        stack.worker.kill(signal.SIGKILL)
        await stack.worker.wait()
        await scrape_until(router, lambda s: not s.value("lorry_router_worker_attached"))
        await stack.worker.start(address)
        await ready(stack.router.address)
        await asyncio.gather(running, return_exceptions=True)
        await tokens_of(client, "reverse", 1)

    after = await scrape_until(router, idle("lorry_router"))
    check_reconciled(after, "lorry_router")
    assert after.value("lorry_router_worker_attached", worker=address) == 1
    lost = "lorry_router_workers_lost_total"
    assert after.value(lost) == before.value(lost) + 1
    received = "lorry_router_requests_received_total"
    assert after.value(received) >= before.value(received) + 2, "and what the client tried again"
    worker = await scrape(url(stack.worker))
    assert worker.value("lorry_worker_requests_total", code="OK") >= 1
    check_reconciled(worker, "lorry_worker")
