"""The front's view of the tensor-parallel ranks: starts all but the first, and watches all.

The first rank is the engine process, which `EngineClient` starts. A rank that ends or is stopped
takes the others with it, since none can finish a step alone.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from lorry.worker.config import EngineConfig
from lorry.worker.engine_channel import STANDING_SIGNAL
from lorry.worker.exits import describe_exit, kill
from lorry.worker.rank_arguments import MAX_REASON_BYTES, LeaderArguments, RankArguments
from lorry.worker.ring import Ring

RANK_COMMAND = (sys.executable, "-m", "lorry.worker.rank_process")
SILENCE_S = 7.0  # after a sign of life; a busy machine delays the next one by far less
TICK_S = 0.25
STOP_S = 5.0
STATES = {"T": "it is stopped", "t": "a debugger holds it", "D": "it waits for a device"}
Fail = Callable[[str], None]


class Ranks:
    """The processes of all ranks of an engine; nothing to do for one."""

    def __init__(self, config: EngineConfig) -> None:
        self.num_others = config.tensor_parallel - 1
        self.failure: str | None = None  # the first one
        self._config = config
        self._pids: dict[int, int] = {}
        self._silent_ticks: dict[int, int] = {}  # of those that have given a sign of life

    @contextlib.asynccontextmanager
    async def running(self, fail: Fail) -> AsyncIterator[LeaderArguments | None]:
        """Start the others; tells `fail` of a rank that is lost. On exit they are gone.

        Yields what the first rank, whose process the caller starts and gives to `watch`, must know.
        """
        if not self.num_others:
            yield None
            return
        async with contextlib.AsyncExitStack() as stack:
            rings = [Ring.create() for _ in range(self.num_others)]
            vital_fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(self.num_others + 1)]
            for ring in rings:
                stack.callback(ring.close)
            for event_fd in vital_fds:
                stack.callback(os.close, event_fd)
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port: int = listening.getsockname()[1]
            for rank, ring in enumerate(rings, 1):
                reason, reason_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                stack.callback(os.close, reason)
                arguments = RankArguments(
                    self._config, rank, ring.handle, vital_fds[rank], reason_fd, port, os.getpid()
                )
                await stack.enter_async_context(self._process(arguments, reason, fail))
            for rank, event_fd in enumerate(vital_fds):
                stack.enter_context(self._listening(rank, event_fd))
            await stack.enter_async_context(self._watching(fail))
            links = tuple(ring.handle for ring in rings)
            yield LeaderArguments(links, vital_fds[0], port, listening.fileno())

    def watch(self, pid: int) -> None:
        """The first rank's process runs."""
        self._pids[0] = pid

    def ask_where_they_stand(self) -> None:
        """Have all ranks write what their threads do."""
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, STANDING_SIGNAL)

    @contextlib.asynccontextmanager
    async def _process(
        self, arguments: RankArguments, reason_fd: int, fail: Fail
    ) -> AsyncIterator[None]:
        try:
            process = await asyncio.create_subprocess_exec(
                *RANK_COMMAND,
                *arguments.to_argv(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr,
                process_group=0,
                pass_fds=arguments.descriptors,
            )
        finally:
            os.close(arguments.reason_fd)  # the process's end of the pipe
        self._pids[arguments.rank] = process.pid
        reaping = asyncio.create_task(self._reap(arguments.rank, process, reason_fd, fail))
        try:
            yield
        finally:
            with contextlib.suppress(TimeoutError):
                # The first rank has told it to end, unless something was lost.
                async with asyncio.timeout(0 if self.failure else STOP_S):
                    await process.wait()
            reaping.cancel()
            await kill(process, f"rank {arguments.rank}")

    async def _reap(
        self, rank: int, process: asyncio.subprocess.Process, reason_fd: int, fail: Fail
    ) -> None:
        code = await process.wait()
        if code:
            reason = os.read(reason_fd, MAX_REASON_BYTES).decode(errors="replace")
            ended = f"failed: {reason}" if reason else f"ended with {describe_exit(code)}"
            self._lose(f"rank {rank} {ended}", fail)

    @contextlib.contextmanager
    def _listening(self, rank: int, event_fd: int) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_reader(event_fd, self._heard, rank, event_fd)
        try:
            yield
        finally:
            loop.remove_reader(event_fd)

    def _heard(self, rank: int, event_fd: int) -> None:
        os.eventfd_read(event_fd)
        self._silent_ticks[rank] = 0

    @contextlib.asynccontextmanager
    async def _watching(self, fail: Fail) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch(fail))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, fail: Fail) -> None:
        """Notice ranks without a sign of life; that all begin is for who waits for the engine.

        Counts this process's own ticks, so that being suspended does not look like silence.
        """
        while True:
            await asyncio.sleep(TICK_S)
            for rank in self._silent_ticks:
                self._silent_ticks[rank] += 1
                if self._silent_ticks[rank] * TICK_S >= SILENCE_S:
                    pid = self._pids[rank]
                    state = describe_state(pid)
                    text = f"rank {rank} (process {pid}) has been silent for {SILENCE_S:g} s"
                    self._lose(f"{text}; {state}" if state else text, fail)

    def _lose(self, reason: str, fail: Fail) -> None:
        if self.failure is None:
            self.failure = f"tensor-parallel {reason}"
            fail(self.failure)


def describe_state(pid: int) -> str | None:
    """Why the kernel does not run a process, where that says something."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return STATES.get(fields[0])
