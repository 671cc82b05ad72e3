"""A run's processes: each sends every n-th request, and their records come together here."""

import asyncio
import contextlib
import dataclasses
import functools
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Sequence

from lorry.client.bench.messages import Progress, Share, read_progress, write_share, write_start

MAX_LINE_BYTES = 1 << 28
START_DELAY_S = 0.1  # until the processes have heard of it


def split(share: Share, num_processes: int) -> list[Share]:
    """What each process is to do of `share`."""
    return [
        dataclasses.replace(
            share,
            records=share.records[number::num_processes],
            max_open=-(-share.max_open // num_processes),
        )
        for number in range(num_processes)
    ]


async def run_parts(shares: Sequence[Share], on_progress: Callable[[int, Progress], None]) -> None:
    """Run a process for each share to its end; `on_progress` hears of each by its number.

    All start together once all are ready. Raises ChildProcessError. No process outlives the call.
    """
    async with contextlib.AsyncExitStack() as stack:
        parts = [await stack.enter_async_context(_part()) for _ in shares]
        await asyncio.gather(*map(_make_ready, parts, shares))
        start_s = time.monotonic() + START_DELAY_S
        for part in parts:
            _stdin(part).write(write_start(start_s))
        follow = (
            _follow(part, len(share.records), functools.partial(on_progress, number))
            for number, (part, share) in enumerate(zip(parts, shares, strict=True))
        )
        await asyncio.gather(*follow)


@contextlib.asynccontextmanager
async def _part() -> AsyncIterator[Process]:
    part = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lorry.client.bench.part"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=MAX_LINE_BYTES,
    )
    try:
        yield part
    finally:
        if part.returncode is None:
            part.kill()
        await part.wait()


async def _make_ready(part: Process, share: Share) -> None:
    with contextlib.suppress(ConnectionError):  # it has ended, which the next line tells
        _stdin(part).write(write_share(share))
        await _stdin(part).drain()
    if not await _stdout(part).readline():
        await part.wait()
        raise ChildProcessError("a process of the load generator ended before its start")


async def _follow(
    part: Process, num_requests: int, on_progress: Callable[[Progress], None]
) -> None:
    async for line in _stdout(part):
        progress = read_progress(line)
        num_requests -= len(progress.ended)
        on_progress(progress)
    await part.wait()
    if num_requests:
        raise ChildProcessError(
            f"a process of the load generator ended with {num_requests} requests unfinished"
        )


def _stdin(part: Process) -> asyncio.StreamWriter:
    assert part.stdin is not None
    return part.stdin


def _stdout(part: Process) -> asyncio.StreamReader:
    assert part.stdout is not None
    return part.stdout
