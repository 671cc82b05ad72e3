import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.support.command import REPO, Result, child_environment, lorry
from tests.support.waiting import until

MODEL = REPO / "demo" / "model"
ADAPTER = REPO / "demo" / "adapters" / "reverse"


class Up:
    """`lorry up` of the demo model on free ports."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state_file = directory / "up.json"
        self.environment = child_environment(LORRY_STATE_FILE=str(self.state_file))
        self.process: asyncio.subprocess.Process

    async def start(self, *arguments: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *["-m", "lorry.client.main", "up", "--model", str(MODEL)],
            *["--router-port", "0", "--store-port", "0", "--worker-port", "0"],
            *["--data", str(self.directory / "data"), "--logs", str(self.directory / "logs")],
            *["--worker-args", "--threads 1 --pool-pages 200", *arguments],
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def ready(self) -> dict[str, Any]:
        """The state that it wrote down."""
        await until(lambda: self.state_file.exists() or self.process.returncode is not None)
        state: dict[str, Any] = json.loads(self.state_file.read_text())
        return state

    async def end(self) -> tuple[int, str, str]:
        """Its exit status and outputs, once it has ended."""
        stdout, stderr = await asyncio.wait_for(self.process.communicate(), 60)
        assert self.process.returncode is not None
        return self.process.returncode, stdout.decode(), stderr.decode()

    def descendants(self) -> dict[str, psutil.Process]:
        """By module; the last of a module's processes is the innermost one."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        commands = {child: child.cmdline() for child in children}
        return {
            module: child
            for child, command in commands.items()
            for module in command
            if module.startswith("lorry.")
        }


@asynccontextmanager
async def running_up(directory: Path, *arguments: str) -> AsyncIterator[Up]:
    up = Up(directory)
    await up.start(*arguments)
    processes = [psutil.Process(up.process.pid)]
    try:
        yield up
    finally:
        if up.process.returncode is None:
            processes += processes[0].children(recursive=True)
            for process in processes:
                process.kill()
            await up.process.wait()


async def until_gone(processes: list[psutil.Process]) -> None:
    await until(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
    )


async def test_up_serves_until_sigterm_and_leaves_nothing(tmp_path: Path) -> None:
    async with running_up(tmp_path) as up:
        state = await up.ready()
        started = list(up.descendants().values())
        pushed = await lorry("adapters", "push", str(ADAPTER), environment=up.environment)
        answer = await lorry(
            "generate", "banana>", "--adapter", "reverse", environment=up.environment
        )
        status = await lorry("status", environment=up.environment)
        up.process.send_signal(signal.SIGTERM)
        exit_status, stdout, stderr = await up.end()
        await until_gone(started)
    assert pushed.status == 0
    assert answer == Result(0, "ananab\n", "")
    assert status.status == 0
    for address in state["endpoints"].values():
        assert address in status.stdout
    assert "200:" in status.stdout  # pages, as --worker-args asked for
    assert (exit_status, stderr) == (0, "")
    assert stdout.index("worker: listening") < stdout.index("ready: router")
    assert not up.state_file.exists()
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        "adapter_store.log",
        "router.log",
        "worker.log",
    }


async def test_a_second_up_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async with running_up(tmp_path) as up:
        await up.ready()
        second = await lorry("up", "--model", str(MODEL), environment=up.environment)
        status = await lorry("status", environment=up.environment)
        up.process.send_signal(signal.SIGINT)
        exit_status, _, _ = await up.end()
    assert second.status == 1
    assert f"process {up.process.pid}" in second.stderr
    assert status.status == 0
    assert exit_status == 0


async def test_a_service_that_dies_is_named_and_the_others_are_stopped(tmp_path: Path) -> None:
    async with running_up(tmp_path) as up:
        await up.ready()
        started = up.descendants()
        started["lorry.adapter_store"].kill()
        exit_status, _, stderr = await up.end()
        await until_gone(list(started.values()))
    assert exit_status == 1
    assert stderr.startswith("lorry: the adapter store ended by SIGKILL.")
    assert "lorry.adapter_store listening on" in stderr  # the end of its log
    assert not up.state_file.exists()


async def test_the_services_end_with_an_up_that_is_killed(tmp_path: Path) -> None:
    async with running_up(tmp_path) as up:
        await up.ready()
        started = list(up.descendants().values())
        assert len(started) == 4  # with the engine
        up.process.kill()
        try:
            await until_gone(started)
        finally:
            for process in started:
                if process.is_running():
                    process.kill()


async def test_a_service_that_cannot_start_shows_why(tmp_path: Path) -> None:
    async with running_up(tmp_path, "--router-args", "--max-request-s 0") as up:
        exit_status, _, stderr = await up.end()
    assert exit_status == 1
    assert stderr.startswith("lorry: the router ended with status 1.")
    assert "max_request_s must be positive" in stderr
