"""A service as a child process, from its start to its end.

STARTING ──► LISTENING ◄──► READY
    │            │            │
    └────────────┼────────────┘
                 ▼
             STOPPING ──► EXITED ◄── any of the above
"""

import asyncio
import contextlib
import enum
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lorry.client.probe import readiness
from lorry.rpc.errors import LorryError

LISTENING_LINE = re.compile(rb"lorry\.\w+ listening on (\S+:\d+)\s*")
PROBE_AGAIN_S = 0.5
LAST_OUTPUT_S = 1.0  # its end comes at once, unless some daemon holds the pipe open
TAIL_BYTES = 16 << 10
TIED = Path(__file__).with_name("tied.py")


class State(enum.Enum):
    STARTING = "starting"
    LISTENING = "listening"
    READY = "ready"
    STOPPING = "stopping"
    EXITED = "exited"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.LISTENING, State.STOPPING, State.EXITED}),
    State.LISTENING: frozenset({State.READY, State.STOPPING, State.EXITED}),
    State.READY: frozenset({State.LISTENING, State.STOPPING, State.EXITED}),
    State.STOPPING: frozenset({State.EXITED}),
    State.EXITED: frozenset(),
}


class IllegalTransition(Exception):
    """A defect of the code that drives the process."""


class ServiceFailed(Exception):
    """A service ended, or was not ready in time; the message has the end of its log."""


class ServiceProcess:
    """Owns one child process and its log file; `stop` leaves nothing of it running.

    The child leads a process group of its own: Ctrl-C in a terminal reaches `lorry up` alone,
    which stops the services in order, and nothing that a service has started outlives it. If this
    process is killed, the child is asked to end too.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        on_change: Callable[["ServiceProcess"], None],
    ) -> None:
        """`on_change` is called after each change of `state`."""
        self.name = name
        self.log = log
        self.state = State.STARTING
        self.address = ""  # HOST:PORT, once LISTENING
        self.ready = asyncio.Event()  # set while READY
        self._command = command
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._copying: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def exit_status(self) -> int | None:
        """None while the child runs."""
        return self._process.returncode if self._process else None

    def move_to(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{self.name}: {self.state.name} to {state.name}")
        self.state = state
        if state is State.READY:
            self.ready.set()
        else:
            self.ready.clear()
        self._on_change(self)

    async def start(self) -> str:
        """Start the child and return the HOST:PORT that it says it listens on."""
        self.log.write_bytes(b"")
        with self.log.open("ab") as log:  # appending, as two processes write it
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, str(TIED), str(os.getpid())],
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        output = self._process.stdout
        assert output is not None
        async for line in output:
            self._write_log(line)
            if match := LISTENING_LINE.fullmatch(line):
                self.address = match[1].decode()
                self.move_to(State.LISTENING)
                self._copying = asyncio.create_task(self._copy_to_log(output))
                self._following = asyncio.create_task(self._follow_readiness())
                return self.address
        await self._process.wait()
        raise self.failure()

    async def stop(self, *, grace_s: float) -> None:
        """Ask the child to drain, and kill what is left of it after `grace_s` seconds."""
        if self._process is None:
            return
        await _end(self._following)  # an open watch would keep the service from ending
        try:
            if self._process.returncode is None:
                self.move_to(State.STOPPING)
                self.terminate()
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        except TimeoutError:
            self._write_log(f"killed: still running {grace_s:g} s after SIGTERM\n".encode())
        finally:
            self.kill()
            await _end(self._copying, after_s=LAST_OUTPUT_S)
        await self._process.wait()
        self.move_to(State.EXITED)

    def terminate(self) -> None:
        """Ask the child to drain."""
        if self._process is not None and self._process.returncode is None:
            # asyncio's own looks first whether the child has ended, and its watcher then does not
            # learn how.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the child and everything that it started, now."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def failure(self) -> ServiceFailed:
        """Why this service is of no use, with the end of its log."""
        status = self.exit_status
        how = f"is only {self.state.value}" if status is None else f"ended {_describe(status)}"
        lines = "\n".join(f"  {line}" for line in self.tail(20))
        return ServiceFailed(f"the {self.name} {how}. The end of {self.log}:\n{lines}")

    def tail(self, num_lines: int) -> list[str]:
        """The last lines of the log."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]

    async def _follow_readiness(self) -> None:
        while True:
            with contextlib.suppress(LorryError):  # not reachable now; if it ended, start over
                async for ready in readiness(self.address):
                    self._set_ready(ready)
            await asyncio.sleep(PROBE_AGAIN_S)

    def _set_ready(self, ready: bool) -> None:
        state = State.READY if ready else State.LISTENING
        if self.state in (State.READY, State.LISTENING) and self.state is not state:
            self.move_to(state)

    async def _copy_to_log(self, output: asyncio.StreamReader) -> None:
        while data := await output.read(1 << 16):
            self._write_log(data)

    def _write_log(self, data: bytes) -> None:
        with self.log.open("ab") as log:
            log.write(data)


async def _end(task: asyncio.Task[None] | None, *, after_s: float = 0.0) -> None:
    """Cancel a task unless it ends by itself before."""
    if task is not None:
        await asyncio.wait([task], timeout=after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _describe(status: int) -> str:
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
