"""How processes end: killed, and in words."""

import asyncio
import logging
import signal
from collections.abc import Mapping
from typing import Protocol

KILL_S = 10.0  # in which the kernel takes back what a killed process holds

log = logging.getLogger(__name__)

MEANING_OF_SIGNAL: Mapping[int, str] = {
    signal.SIGKILL: ", as when the machine is out of memory",
    signal.SIGBUS: ", as when shared memory is full, or a mapped file became shorter",
}


def describe_exit(code: int) -> str:
    """An exit code as subprocess knows it, with what a signal is and mostly means."""
    if code >= 0:
        return f"exit code {code}"
    return f"exit code {code} ({signal.strsignal(-code)}{MEANING_OF_SIGNAL.get(-code, '')})"


class Process(Protocol):
    """What is needed of asyncio's."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def kill(self) -> None: ...
    async def wait(self) -> int: ...


async def kill(process: Process, name: str) -> None:
    """Have it ended, unless it waits for a device that does not answer: then it is left behind."""
    if process.returncode is not None:
        return
    process.kill()
    try:
        async with asyncio.timeout(KILL_S):
            await process.wait()
    except TimeoutError:
        log.error("%s (process %d) was killed and is still there", name, process.pid)
