"""Processes that are killed, and one that even that does not end."""

import asyncio

import pytest

from lorry.worker import exits


class Unkillable:
    """As a process that waits for a device which does not answer."""

    pid = 7
    returncode = None

    def kill(self) -> None:
        pass

    async def wait(self) -> int:
        await asyncio.Event().wait()
        return 0


async def test_a_killed_process_is_gone() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "1000")
    await exits.kill(process, "it")
    assert process.returncode == -9
    await exits.kill(process, "it")


async def test_a_process_that_does_not_go_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exits, "KILL_S", 0.0)
    await exits.kill(Unkillable(), "rank 1")
    assert "rank 1 (process 7) was killed and is still there" in caplog.text
