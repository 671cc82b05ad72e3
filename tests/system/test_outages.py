"""The store and the router die or are stopped under load, and a worker runs out of memory."""

import asyncio
import contextlib
import resource
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from demo import tasks
from lorry.client import Client, Request
from lorry.client.retry import RetryPolicy
from lorry.rpc.errors import LorryError, StoreUnavailable
from tests.support.command import REPO
from tests.support.processes import DEMO_MODEL, Service, Stack, ready
from tests.support.streams import outputs

ADAPTERS = ["reverse", "rot13", "double-letters"]
NUM_STREAMS = 6
NUM_TOKENS = 150
PATIENT = RetryPolicy(attempts=30)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("outages"))
    try:
        await stack.start()
        await ready(stack.router.address)
        async with stack.client() as client:
            for adapter in ADAPTERS:
                await client.adapters.push(demo_adapter(adapter))
        yield stack
    finally:
        await stack.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(stack: Stack) -> list[list[int]]:
    expected = await outputs(stack.client, REQUESTS)
    assert len({tuple(token_ids) for token_ids in expected}) == NUM_STREAMS
    return expected


def demo_adapter(name: str) -> Path:
    return REPO / "demo" / "adapters" / name


def request(number: int, **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "adapter": ["", *ADAPTERS][number % 4],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
    }
    return Request(
        prompt=tasks.make_prompt("transport"), temperature=1.1, seed=number, **(defaults | fields)
    )


REQUESTS = [request(number) for number in range(NUM_STREAMS)]


async def kill(service: Service) -> None:
    service.kill()
    await service.wait()


async def serves(stack: Stack, adapter: str) -> None:
    """The next request succeeds."""
    answers = {"reverse": "yrrol", "uppercase": "LORRY", "sort-letters": "lorry"}
    async with stack.client() as client:
        answer = await client.generate(
            Request(prompt=tasks.make_prompt("lorry"), adapter=adapter, temperature=0.0),
            timeout_s=60,
        )
    assert answer.text == answers[adapter]


async def names(stack: Stack) -> set[str]:
    async with stack.client() as client:
        return {adapter.name.rpartition("/")[2] async for adapter in client.adapters.list()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
async def test_a_store_that_goes_under_load_costs_no_stream_and_no_upload(
    stack: Stack, undisturbed: list[list[int]], number: signal.Signals
) -> None:
    """Uploads under way go on in the store's next life; what it acknowledged is there."""
    ids = [f"{number.name.lower()}-{index}" for index in range(6)]
    statuses = list[int]()

    async def push(client: Client, adapter_id: str) -> None:
        await client.adapters.push(demo_adapter("uppercase"), adapter_id=adapter_id)

    async def disturb() -> None:
        async with (
            Client(store=stack.store.address, retry=PATIENT) as client,
            asyncio.TaskGroup() as group,
        ):
            for adapter_id in ids:
                group.create_task(push(client, adapter_id))
            await asyncio.sleep(0.02)
            stack.store.kill(number)
            statuses.append(await stack.store.wait())
            await stack.store.start(stack.store.address)

    assert await outputs(stack.client, REQUESTS, disturb) == undisturbed
    assert statuses == [0 if number is signal.SIGTERM else -signal.SIGKILL]
    await ready(stack.store.address)
    assert await names(stack) >= {*ADAPTERS, *ids}
    async with stack.client() as client:
        for adapter_id in ids:
            word = Request(prompt=tasks.make_prompt("lorry"), adapter=adapter_id, temperature=0.0)
            assert (await client.generate(word, timeout_s=60)).text == "LORRY"
            await client.adapters.delete(adapter_id)


async def test_without_a_store_what_is_not_known_is_unavailable_and_the_rest_is_served(
    stack: Stack, undisturbed: list[list[int]]
) -> None:
    await kill(stack.store)
    once = RetryPolicy(attempts=1)
    async with Client(router=stack.router.address, store=stack.store.address, retry=once) as client:
        with pytest.raises(StoreUnavailable) as failure:
            await client.generate(request(0, adapter="never-heard-of"), timeout_s=60)
        assert failure.value.retry_after_s is not None
        assert failure.value.metadata == {"adapter": "tenants/default/adapters/never-heard-of"}
        with pytest.raises(LorryError) as unreachable:
            await client.adapters.push(demo_adapter("sort-letters"))
        assert unreachable.value.code.name == "UNAVAILABLE"
    assert await outputs(stack.client, REQUESTS) == undisturbed
    await stack.store.start(stack.store.address)
    async with stack.client() as client:
        await client.adapters.push(demo_adapter("sort-letters"))
    await serves(stack, "sort-letters")


async def test_services_that_start_without_a_store_serve_the_base_model_until_it_comes(
    stack: Stack, undisturbed: list[list[int]]
) -> None:
    for service in (stack.router, stack.worker, stack.store):
        await kill(service)
    for service in (stack.worker, stack.router):
        await service.start(service.address)
    await ready(stack.worker.address)
    once = RetryPolicy(attempts=1)
    async with stack.client() as client:
        answer = await client.generate(request(0), timeout_s=60)
        assert list(answer.token_ids) == undisturbed[0]
        async with Client(router=stack.router.address, retry=once) as hasty:
            with pytest.raises(StoreUnavailable):
                await hasty.generate(request(1), timeout_s=60)
    await stack.store.start(stack.store.address)
    await ready(stack.router.address)
    assert await outputs(stack.client, REQUESTS) == undisturbed


async def test_a_killed_router_leaves_the_worker_free_and_its_next_life_serves(
    stack: Stack, undisturbed: list[list[int]]
) -> None:
    with pytest.raises(ExceptionGroup) as failures:
        await outputs(stack.client, REQUESTS, lambda: kill(stack.router))
    for error in failures.value.exceptions:
        assert isinstance(error, LorryError)
        assert error.code.name == "UNAVAILABLE"
    await stack.idle()
    await stack.router.start(stack.router.address)
    await ready(stack.router.address)
    assert await outputs(stack.client, REQUESTS) == undisturbed


async def test_clients_of_two_routers_go_on_with_the_other_when_one_is_killed(
    stack: Stack, undisturbed: list[list[int]]
) -> None:
    log = stack.directory / "router-2.log"
    other = Service("router", log, *stack.router.options)
    await other.start()
    try:
        await ready(other.address)
        addresses = f"{other.address},{stack.router.address}"
        async with Client(router=addresses, retry=RetryPolicy(attempts=1)) as client:
            async with client.stream(request(0), timeout_s=120) as stream:
                begun = list((await anext(stream)).token_ids)
                await kill(other)
                with contextlib.suppress(LorryError):  # unless the rest was under way already
                    async for chunk in stream:
                        begun += chunk.token_ids
            answers = [client.generate(request(n), timeout_s=120) for n in range(NUM_STREAMS)]
            found = await asyncio.gather(*answers)
    finally:
        await other.stop()
    assert begun == undisturbed[0][: len(begun)]  # no token twice
    assert [list(each.token_ids) for each in found] == undisturbed
    await stack.idle()


async def test_streams_of_an_engine_without_memory_go_on_in_the_workers_next_life(
    stack: Stack, undisturbed: list[list[int]]
) -> None:
    [engine] = psutil.Process(stack.worker.pid).children()

    async def disturb() -> None:
        limit_bytes = engine.memory_info().vms + (1 << 20)
        resource.prlimit(engine.pid, resource.RLIMIT_AS, (limit_bytes, limit_bytes))
        long = asyncio.create_task(ask_much(stack))
        assert await stack.worker.wait() != 0
        await stack.worker.start(stack.worker.address)
        await long

    assert await outputs(stack.client, REQUESTS, disturb) == undisturbed
    assert "out of memory" in stack.worker.log.read_text()


async def ask_much(stack: Stack) -> None:
    """Prompts for whose steps the engine needs more memory than before."""
    async with stack.client() as client:
        prompt = [5 + number % 200 for number in range(900)]
        await asyncio.gather(
            *(
                client.generate(Request(prompt=[number + 3, *prompt], max_tokens=2), timeout_s=120)
                for number in range(8)
            )
        )


async def test_a_pool_that_does_not_fit_ends_the_worker_with_a_sentence(tmp_path: Path) -> None:
    worker = Service(
        "worker",
        tmp_path / "worker.log",
        *["--model", str(DEMO_MODEL), "--store", "127.0.0.1:1", "--shm-dir", str(tmp_path / "shm")],
        *["--pool-bytes", str(1 << 46)],
    )
    await worker.start()
    try:
        assert await worker.wait() == 1
    finally:
        await worker.stop()
    assert "the machine is out of memory; lower pool_bytes" in worker.log.read_text()
