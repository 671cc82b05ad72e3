"""docker-compose.yml brings Lorry up, and the demo's requests are answered."""

import asyncio
from collections.abc import Iterator

import pytest
from rich.console import Console

from demo.answers import read_expected
from demo.run import ask_everything, push_adapters
from lorry.client import Client
from tests.containers.compose import Project, running
from tests.containers.engine import Engine
from tests.support.processes import ready

ROUTER, STORE = "127.0.0.1:50051", "127.0.0.1:50052"
SERVICES = ["adapter-store", "worker", "router"]


@pytest.fixture(scope="module")
def project(engine: Engine) -> Iterator[Project]:
    """Without a GPU and credentials."""
    files = ["docker-compose.yml", "docker-compose.cpu.yml"]
    with running(Project(engine, files)) as project:
        asyncio.run(ready(ROUTER))
        yield project


async def test_the_demos_requests_are_answered_through_the_published_ports(
    project: Project,
) -> None:
    console = Console(quiet=True)
    async with Client(router=ROUTER, store=STORE, timeout_s=120) as client:
        pushed = await push_adapters(client, console)
        await ask_everything(client, console, read_expected(), pushed)
    metrics = project.execute(
        "worker",
        "python",
        "-c",
        "import urllib.request as u;print(u.urlopen('http://127.0.0.1:51053/metrics').read().decode())",
    )
    fetched = [line for line in metrics.splitlines() if "worker_fetch_bytes_total{" in line]
    assert {line.rpartition(" ")[0]: float(line.split()[-1]) > 0 for line in fetched} == {
        'lorry_worker_fetch_bytes_total{source="shm"}': True,  # store and worker share memory
        'lorry_worker_fetch_bytes_total{source="chunks"}': False,
    }


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_healthy_and_can_do_little(project: Project, service: str) -> None:
    container = project.container(service)
    if project.engine.is_podman:
        project.engine.run("healthcheck", "run", container)
    assert project.execute(service, "id", "--user").strip() == "10001"
    written = "import pathlib; pathlib.Path('/opt/code/x').write_text('')"
    refused = project.engine.run(
        "exec", container, "sh", "-c", f'python -c "{written}" 2>&1 || true'
    )
    assert "Read-only file system" in refused
    status = project.execute(service, "cat", "/proc/self/status").splitlines()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


@pytest.mark.parametrize("service", ["adapter-store", "router"])
def test_only_the_worker_has_torch(project: Project, service: str) -> None:
    found = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('triton'))"
    assert project.execute(service, "python", "-c", found).split() == ["None", "None"]
