"""Workers that DNS names and forgets while the router runs."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import NoWorker
from lorry.v1 import inference_service_pb2 as pb
from tests.support.byte_model import tokens_of
from tests.support.fake_worker import LENGTH, FakeWorker, Reply
from tests.support.names import Names
from tests.support.router_stack import Stack, error_of, router_stack
from tests.support.waiting import until

SPEC = pb.GenerationSpec(prompt="p")
NAME = "workers.test"
HOSTS = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


@contextlib.asynccontextmanager
async def named_workers(
    model: Path, *listed: str, **config: Any
) -> AsyncIterator[tuple[Stack, Names, dict[str, FakeWorker]]]:
    """A worker on every host, all on one port, of which the name has the `listed` ones."""
    digest, names = read_base_model(model).digest, Names()
    workers = {host: FakeWorker(digest) for host in HOSTS}
    names.hosts[NAME] = listed
    async with contextlib.AsyncExitStack() as stack:
        port = 0
        for host, worker in workers.items():
            await stack.enter_async_context(worker.serving(port, host))
            port = worker.port
        built = router_stack(
            model,
            num_workers=0,
            resolve=names.resolve,
            targets=(f"dns:///{NAME}:{port}",),
            dns_interval_s=0.05,
            wait=False,
            **config,
        )
        yield await stack.enter_async_context(built), names, workers


def attached(stack: Stack) -> set[str]:
    return {worker.name.rpartition(":")[0] for worker in stack.running.router._dispatcher.workers}


async def test_every_address_of_the_name_is_a_worker(model: Path) -> None:
    async with named_workers(model, *HOSTS) as (stack, _, _):
        await until(lambda: attached(stack) == set(HOSTS))
        await stack.until_health(ready=True)


async def test_new_addresses_get_requests_and_old_ones_only_finish_theirs(model: Path) -> None:
    first, second, _ = HOSTS
    async with named_workers(model, first) as (stack, names, workers):
        await stack.until_health(ready=True)
        running = asyncio.ensure_future(stack.stream(SPEC))
        await workers[first].until(lambda: len(workers[first].submits) == 1)
        names.hosts[NAME] = [second]
        await until(lambda: attached(stack) == {first, second})
        workers[second].reply = lambda submit: Reply(tokens_of("ok"))
        for _ in range(3):
            assert (await stack.stream(SPEC)).text == "ok"
        assert len(workers[first].submits) == 1
        workers[first].draw(1, *tokens_of("done"))
        workers[first].finish(1, LENGTH)
        assert (await running).text == "done"
        await until(lambda: attached(stack) == {second})
        stack.check_idle()


async def test_an_address_that_comes_back_is_used_again(model: Path) -> None:
    first = HOSTS[0]
    async with named_workers(model, first) as (stack, names, workers):
        await stack.until_health(ready=True)
        running = asyncio.ensure_future(stack.stream(SPEC))
        await workers[first].until(lambda: len(workers[first].submits) == 1)
        names.hosts[NAME] = []
        await stack.until_health(ready=False)
        assert isinstance(await error_of(stack.stream(SPEC)), NoWorker)
        names.hosts[NAME] = [first]
        await stack.until_health(ready=True)
        workers[first].reply = lambda submit: Reply(tokens_of("ok"))
        assert (await stack.stream(SPEC)).text == "ok"
        assert len(workers[first].hellos) == 1, "its stream was kept"
        workers[first].finish(1, LENGTH)
        await running


async def test_an_outage_of_dns_loses_no_worker(model: Path) -> None:
    async with named_workers(model, *HOSTS) as (stack, names, workers):
        await until(lambda: attached(stack) == set(HOSTS))
        names.failure, looked_up = socket.EAI_AGAIN, names.num_looked_up
        await until(lambda: names.num_looked_up > looked_up + 2)
        assert attached(stack) == set(HOSTS)
        for worker in workers.values():
            worker.reply = lambda submit: Reply(tokens_of("ok"))
        assert (await stack.stream(SPEC)).text == "ok"


async def test_a_damaged_token_file_neither_ends_the_router_nor_keeps_new_workers_out(
    model: Path, tmp_path: Path
) -> None:
    first, second, _ = HOSTS
    token_file = tmp_path / "token"
    token_file.write_text("secret")
    async with named_workers(model, first, token_file=token_file) as (stack, names, workers):
        await until(lambda: attached(stack) == {first})
        token_file.write_text("\n")
        names.hosts[NAME] = [first, second]
        await until(lambda: attached(stack) == {first, second})
        assert workers[second].tokens == {"Bearer secret"}


async def test_an_address_nobody_listens_on_is_forgotten_with_its_name(model: Path) -> None:
    async with named_workers(model, HOSTS[0], "127.0.0.9") as (stack, names, _):
        await stack.until_health(ready=True)
        links = stack.running.router._fleet._links
        assert len(links) == 2
        names.hosts[NAME] = HOSTS[:1]
        await until(lambda: len(links) == 1)


async def test_a_worker_that_loads_is_logged_once(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loading = {"failure": NoWorker("the engine is still loading the model")}
    async with router_stack(model, worker=loading, wait=False) as stack:
        await until(lambda: len(stack.worker.hellos) >= 4)
        records = [r for r in caplog.records if "still loading" in r.getMessage()]
        assert [record.levelno for record in records] == [logging.INFO]
        stack.worker.failure = None
        await stack.until_health(ready=True)
        stack.worker.failure = NoWorker("the engine is still loading the model")
        stack.worker.end_stream()
        await until(lambda: len(stack.worker.hellos) >= 7)
        records = [r for r in caplog.records if "still loading" in r.getMessage()]
        assert len(records) == 2
