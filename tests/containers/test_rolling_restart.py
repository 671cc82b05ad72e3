"""Two routers, two workers, the store and its Redis restart one by one; no request fails.

The services are those of docker-compose.yml with their certificates, but on the CPU.
"""

import asyncio
import copy
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from demo.answers import read_expected
from demo.run import push_adapters
from lorry.client import Client, Request
from lorry.client.generation import Generation
from lorry.client.retry import RetryPolicy
from lorry.rpc.channel import Credentials
from tests.containers.compose import Project, configuration, running
from tests.containers.engine import Engine
from tests.containers.images import REDIS
from tests.support.deployment import make_secrets
from tests.support.processes import ready

PORTS = {"router": 50051, "router-2": 50151}  # on this machine
STORE = "127.0.0.1:50052"
WORKERS = ["worker", "worker-2"]
NUM_CLIENTS = 4
RECOVERY_S = 120.0
PATIENT = RetryPolicy(attempts=60, max_delay_s=1.0)
COUNT_ATTACHED = """
import ssl, urllib.request
own = "/run/secrets/router/"
context = ssl.create_default_context(cafile=own + "ca.crt")
context.load_cert_chain(own + "tls.crt", own + "tls.key")
print(urllib.request.urlopen("https://localhost:51051/metrics", context=context).read().decode())
"""


def two_of_each(configuration: dict[str, Any]) -> dict[str, Any]:
    """With a second router at a port of its own, and a second worker under the name of both."""
    services = configuration["services"]
    services["redis"]["image"] = REDIS
    del services["worker"]["deploy"]
    services["worker"]["command"] += ["--device=cpu", "--threads=1"]
    services["router-2"] = copy.deepcopy(services["router"])
    services["router-2"]["ports"] = [f"127.0.0.1:{PORTS['router-2']}:50051"]
    services["worker-2"] = copy.deepcopy(services["worker"])
    services["worker-2"]["networks"] = {"lorry": {"aliases": ["worker"]}}
    return configuration


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    make_secrets(tmp_path / "secrets")
    return tmp_path / "secrets"


@pytest.fixture
def project(engine: Engine, secrets: Path, tmp_path: Path) -> Iterator[Project]:
    variables = {"LORRY_SECRETS": str(secrets)}
    files = ["docker-compose.yml", "docker-compose.redis.yml"]
    shipped = configuration(Project(engine, files, variables))
    file = tmp_path / "docker-compose.yml"
    # JSON, since a plain `yes` is a word to some readers of YAML and true to others.
    file.write_text(json.dumps(two_of_each(shipped)))
    with running(Project(engine, [str(file)], variables)) as project:
        yield project


@pytest.fixture
async def clients(secrets: Path) -> AsyncIterator[list[Client]]:
    """One for each router."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                Client(
                    router=f"127.0.0.1:{port}",
                    store=STORE,
                    tls=secrets / "admin",
                    timeout_s=120,
                    retry=PATIENT,
                )
            )
            for port in PORTS.values()
        ]


class Load:
    """Clients that ask the demo's questions without a pause; any wrong answer ends them."""

    def __init__(self, clients: list[Client]) -> None:
        self._answered = asyncio.Event()
        self._clients = deque(clients)
        self._questions = cycle(read_expected())

    async def ask_on(self) -> None:
        for question in self._questions:
            answer = await self._ask(question.request)
            assert list(answer.token_ids) == question.answer.token_ids
            self._answered.set()

    async def list_on(self) -> None:
        while True:
            assert [adapter async for adapter in self._clients[0].adapters.list()]
            await asyncio.sleep(0.1)

    async def one_more(self) -> None:
        self._answered.clear()
        async with asyncio.timeout(RECOVERY_S):
            await self._answered.wait()

    async def _ask(self, request: Request) -> Generation:
        self._clients.rotate()
        return await self._clients[0].generate(request)


@asynccontextmanager
async def under_load(clients: list[Client]) -> AsyncIterator[Load]:
    """The first failure ends the block with it."""
    load = Load(clients)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(load.ask_on()) for _ in range(NUM_CLIENTS)]
        tasks.append(group.create_task(load.list_on()))
        yield load
        for task in tasks:
            task.cancel()


async def all_workers_attached(project: Project) -> None:
    """Return once every router has a stream to both workers."""
    async with asyncio.timeout(RECOVERY_S):
        while True:
            if [await attached(project, router) for router in PORTS] == [len(WORKERS)] * len(PORTS):
                return
            await asyncio.sleep(0.5)


async def attached(project: Project, router: str) -> int:
    printed = await asyncio.to_thread(project.execute, router, "python", "-c", COUNT_ATTACHED)
    return len(re.findall(r"^lorry_router_worker_attached\{.*\} 1\.0$", printed, re.MULTILINE))


async def test_a_rolling_restart_fails_no_request(
    project: Project, clients: list[Client], secrets: Path
) -> None:
    routers = {name: f"127.0.0.1:{port}" for name, port in PORTS.items()}
    for address in routers.values():
        await ready(address, Credentials(tls=secrets / "admin"))
    await all_workers_attached(project)
    await push_adapters(clients[0], Console(quiet=True))
    async with under_load(clients) as load:
        for service in [*routers, *WORKERS, "adapter-store", "redis"]:
            await asyncio.to_thread(project.run, "restart", service)
            if service in routers:
                await ready(routers[service], Credentials(tls=secrets / "admin"))
            await all_workers_attached(project)
            await load.one_more()
