import sys
from pathlib import Path

import pytest

from lorry.client.local import stack as stack_module
from lorry.client.local.process import ServiceProcess
from lorry.client.local.stack import LocalStack, StackOptions
from tests.support.command import child_environment


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    return tmp_path


async def started(directory: Path, *behaviours: str) -> LocalStack:
    """Tiny services in place of store, worker and router."""
    stack = LocalStack(StackOptions(model=directory, logs=directory), lambda service: None)
    for index, behaviour in enumerate(behaviours):
        command = [sys.executable, "-m", "tests.support.tiny_service", behaviour]
        command.append(str(directory / f"{index}.pid"))
        log = directory / f"{index}.log"
        stack.services.append(ServiceProcess("tiny", command, log=log, on_change=lambda _: None))
        await stack.services[-1].start()
    return stack


async def test_killing_a_stack_lets_only_the_store_clean_up(directory: Path) -> None:
    stack = await started(directory, "ready", "ready", "stubborn")
    store, *others = stack.services
    await store.ready.wait()  # it takes SIGTERM as a request to drain
    stack.kill()
    await stack.stop()
    assert "drained" in store.tail(20)
    assert [service.exit_status for service in others] == [-9, -9]


async def test_a_store_that_does_not_end_is_killed_soon_too(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_module, "STORE_GRACE_S", 0.1)
    stack = await started(directory, "stubborn", "ready", "ready")
    stack.kill()
    await stack.stop()
    assert [service.exit_status for service in stack.services] == [-9, -9, -9]
    assert "killed: still running" not in "".join(stack.services[0].tail(5))


async def test_a_stack_of_which_nothing_was_started_can_be_killed(directory: Path) -> None:
    stack = await started(directory)
    stack.kill()
    await stack.stop()
