import itertools
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from lorry.client.local.process import (
    TRANSITIONS,
    IllegalTransition,
    ServiceFailed,
    ServiceProcess,
    State,
)
from tests.support.waiting import until

REPO = Path(__file__).parents[2]


def tiny(log: Path, *arguments: str) -> tuple[ServiceProcess, list[State]]:
    states: list[State] = []
    command = [sys.executable, "-m", "tests.support.tiny_service", *arguments]
    service = ServiceProcess(
        "tiny", command, log=log, on_change=lambda service: states.append(service.state)
    )
    return service, states


@asynccontextmanager
async def running(log: Path, *arguments: str) -> AsyncIterator[ServiceProcess]:
    service, _ = tiny(log, *arguments)
    try:
        await service.start()
        yield service
    finally:
        await service.stop(grace_s=10)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), *sys.path]))
    return tmp_path / "tiny.log"


async def test_a_service_starts_becomes_ready_and_drains(log: Path) -> None:
    service, states = tiny(log, "ready")
    address = await service.start()
    await service.ready.wait()
    await service.stop(grace_s=10)
    assert address == service.address
    assert states == [State.LISTENING, State.READY, State.STOPPING, State.EXITED]
    assert service.exit_status == 0


async def test_the_log_has_both_outputs_from_first_to_last(log: Path) -> None:
    async with running(log, "ready") as service:
        await service.ready.wait()
    lines = service.tail(20)
    assert lines[0] == "a line of output"
    assert "drained" in lines


async def test_a_service_that_dies_at_its_start_shows_the_end_of_its_log(log: Path) -> None:
    service, _ = tiny(log, "die-at-start")
    with pytest.raises(ServiceFailed, match=r"(?s)tiny ended with status 1.*no memory left"):
        await service.start()
    await service.stop(grace_s=10)
    assert service.state is State.EXITED


async def test_a_service_that_dies_later_is_noticed(log: Path) -> None:
    async with running(log, "die-later") as service:
        await until(lambda: service.exit_status is not None)
    assert "lost the engine" in str(service.failure())


async def test_a_service_that_is_never_ready_stays_listening(log: Path) -> None:
    async with running(log, "never-ready") as service:
        assert service.state is State.LISTENING
        assert not service.ready.is_set()


async def test_watching_a_service_does_not_keep_it_from_draining(log: Path) -> None:
    service, _ = tiny(log, "patient")
    await service.start()
    await service.ready.wait()
    await service.stop(grace_s=10)
    assert service.exit_status == 0


async def test_a_service_that_ignores_sigterm_is_killed_with_all_it_started(
    log: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    service, _ = tiny(log, "stubborn", str(pid_file))
    await service.start()
    child = psutil.Process(int(pid_file.read_text()))
    await service.stop(grace_s=0.2)
    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert service.exit_status == -9
    assert service.tail(1) == ["killed: still running 0.2 s after SIGTERM"]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(State, State)))
def test_only_the_transitions_of_the_table_are_allowed(
    source: State, target: State, tmp_path: Path
) -> None:
    service, _ = tiny(tmp_path / "log")
    service.state = source
    if target in TRANSITIONS[source]:
        service.move_to(target)
        assert service.state is target
    else:
        with pytest.raises(IllegalTransition, match=f"{source.name} to {target.name}"):
            service.move_to(target)
        assert service.state is source
