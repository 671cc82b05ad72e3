"""The front's end of its link to the engine process, and that process's life.

An engine that exits or falls silent is lost for good: the worker ends with it, and the routers
recover. Nothing here waits for the engine, so a long step stalls no gRPC call.
"""

import asyncio
import collections
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence

from lorry.worker.config import EngineConfig
from lorry.worker.engine_channel import EngineArguments
from lorry.worker.exits import describe_exit, kill
from lorry.worker.messages import Codec, Command, Event, Failed, Stop
from lorry.worker.rank_arguments import LeaderArguments
from lorry.worker.ranks import Ranks
from lorry.worker.ring import Ring

ENGINE_COMMAND = (sys.executable, "-m", "lorry.worker.engine_process")
FLUSH_S = 0.005
STOP_S = 5.0
PROGRESS_S = 10.0
TICK_S = 0.25
MAX_BACKLOG_BYTES = 64 << 20
LAST_LINES = 20
STANDING_S = 1.0  # for ranks to write where they stand
REASON_S = 1.0  # in which the cause of a rank's failure, another rank's, is seen, too
READ_BYTES = 1 << 16
Handler = Callable[[list[Event]], None]

log = logging.getLogger(__name__)


class EngineLost(Exception):
    """The engine process ended, hung, or sent what the front could not handle."""


class EngineClient:
    """Commands out, events in."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        start_timeout_s: float,
        silence_s: float,
    ) -> None:
        self.pid: int | None = None  # of the process, once it runs
        self._config = config
        self._command = command
        self._start_timeout_s = start_timeout_s
        self._silence_s = silence_s
        self._codec = Codec()
        self._ranks = Ranks(config)
        self._commands = Ring.create()
        self._events = Ring.create()
        self._backlog: collections.deque[bytes] = collections.deque()
        self._backlog_bytes = 0
        self._num_messages = 0
        self._last_message_s = asyncio.get_running_loop().time()
        self._last_lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._lost: asyncio.Future[EngineLost] = asyncio.get_running_loop().create_future()

    @property
    def silent_s(self) -> float:
        """Seconds since the engine's last message."""
        return asyncio.get_running_loop().time() - self._last_message_s

    async def lost(self) -> EngineLost:
        """Wait until there is no engine any more, and say why."""
        return await asyncio.shield(self._lost)

    def send(self, command: Command) -> None:
        """Pass a command on, in order, as soon as the ring has room."""
        record = self._codec.encode([command])
        if not self._backlog and self._commands.try_write(record):
            return
        if not self._backlog:
            asyncio.get_running_loop().call_later(FLUSH_S, self._flush)
        self._backlog.append(record)
        self._backlog_bytes += len(record)
        if self._backlog_bytes > MAX_BACKLOG_BYTES:
            self._fail("takes no commands")

    @contextlib.asynccontextmanager
    async def running(self, handle: Handler) -> AsyncIterator[None]:
        """Start the process and give each message of it to `handle`; on exit it is gone."""
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(contextlib.closing(self._commands))
            stack.enter_context(contextlib.closing(self._events))
            leader = await stack.enter_async_context(self._ranks.running(self._lose))
            process = await self._spawn(leader)
            self.pid = process.pid
            self._ranks.watch(process.pid)
            loop.add_reader(self._events.fileno(), self._read, handle)
            tasks = [
                loop.create_task(self._forward_output(process)),
                loop.create_task(self._reap(process, handle)),
                loop.create_task(self._watch()),
            ]
            try:
                yield
            finally:
                await self._stop(process)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                loop.remove_reader(self._events.fileno())

    async def _spawn(self, leader: LeaderArguments | None) -> asyncio.subprocess.Process:
        commands, events = self._commands.handle, self._events.handle
        arguments = EngineArguments(self._config, commands, events, os.getpid(), leader)
        return await asyncio.create_subprocess_exec(
            *self._command,
            *arguments.to_argv(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,  # Ctrl-C is for the front, which drains first
            pass_fds=arguments.descriptors,
        )

    def _read(self, handle: Handler) -> None:
        """Take what the engine wrote; what cannot be handled ends it, lest a request be lost."""
        for record in self._events.read_all():
            self._num_messages += 1
            self._last_message_s = asyncio.get_running_loop().time()
            try:
                if not self._lost.done():
                    self._take(self._codec.decode_events(record), handle)
            except Exception:
                log.exception("a message of the engine cannot be handled")
                self._fail("sent a message that cannot be handled")

    def _take(self, events: list[Event], handle: Handler) -> None:
        match events:
            case [Failed(message)]:
                self._fail(f"failed: {message}")
            case _:
                handle(events)

    def _flush(self) -> None:
        if self._lost.done():
            return
        while self._backlog and self._commands.try_write(self._backlog[0]):
            self._backlog_bytes -= len(self._backlog.popleft())
        if self._backlog:
            asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def _fail(self, reason: str) -> None:
        """The engine is lost, at once or as soon as other ranks' failures would be known."""
        if self._ranks.num_others and self._ranks.failure is None:
            asyncio.get_running_loop().call_later(REASON_S, self._lose, f"the engine {reason}")
        else:
            self._lose(f"the engine {reason}")

    def _lose(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_result(EngineLost(reason))
            # Nobody tells the other ranks to end any more, so they are not waited for.
            self._ranks.failure = self._ranks.failure or reason

    async def _reap(self, process: asyncio.subprocess.Process, handle: Handler) -> None:
        exit_code = await process.wait()
        self._read(handle)  # what it still had to say
        await asyncio.sleep(0.1)  # and why it died
        lines = "\n  ".join(self._last_lines)
        self._fail(f"ended with {describe_exit(exit_code)}; its last lines:\n  {lines}")

    async def _watch(self) -> None:
        """Notice an engine that does not start or falls silent, as one that waits for a hung GPU.

        Counts this process's own ticks, so that being suspended does not look like silence.
        """
        seen, silent_s, reported_s = 0, 0.0, 0.0
        while silent_s < (self._silence_s if seen else self._start_timeout_s):
            await asyncio.sleep(TICK_S)
            silent_s += TICK_S
            if self._num_messages != seen:
                seen, silent_s = self._num_messages, 0.0
            elif not seen and silent_s >= reported_s + PROGRESS_S:
                reported_s = silent_s
                log.info("the engine has been loading for %.0f s", silent_s)
        if seen:
            self._ranks.ask_where_they_stand()
            await asyncio.sleep(STANDING_S)
        self._fail(f"has been silent for {silent_s:.0f} s" if seen else "did not start in time")

    async def _forward_output(self, process: asyncio.subprocess.Process) -> None:
        """Copy the engine's output to this process's log."""
        assert process.stdout is not None
        rest = ""
        while chunk := await process.stdout.read(READ_BYTES):
            text = chunk.decode(errors="replace")
            sys.stderr.write(text)
            *lines, rest = (rest + text).split("\n")
            self._last_lines.extend(lines)
            rest = rest[-READ_BYTES:]

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        """Ask the engine to end if it listens, then make it."""
        if self._num_messages and not self._lost.done():
            self.send(Stop())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await process.wait()
        await kill(process, "the engine")
