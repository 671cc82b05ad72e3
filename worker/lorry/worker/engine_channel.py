"""The engine process's end of its link to the front, and the command line that carries it.

The link needs no care at the end: the rings have no names, and the kernel kills the engine process
when the front is gone, also in the middle of a step.
"""

import argparse
import ctypes
import faulthandler
import os
import signal
from collections.abc import Sequence
from typing import NamedTuple

from lorry.worker.config import EngineConfig
from lorry.worker.messages import Codec, Command, Event
from lorry.worker.rank_arguments import LeaderArguments
from lorry.worker.ring import Ring, RingFull, RingHandle

SEND_TIMEOUT_S = 10.0
STANDING_SIGNAL = signal.SIGUSR1  # by which the front asks where all threads stand
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class FrontGone(Exception):
    """The front died, or stopped reading: the engine process has nothing to live for."""


class EngineArguments(NamedTuple):
    """The command line of the engine process."""

    config: EngineConfig
    commands: RingHandle
    events: RingHandle
    front_pid: int
    ranks: LeaderArguments | None = None  # of several tensor-parallel ones

    def to_argv(self) -> list[str]:
        return [
            f"--config={self.config.to_json()}",
            f"--commands={self.commands}",
            f"--events={self.events}",
            f"--front={self.front_pid}",
            *([] if self.ranks is None else [f"--ranks={self.ranks}"]),
        ]

    @property
    def descriptors(self) -> list[int]:
        """That the process inherits."""
        rings = [fd for r in (self.commands, self.events) for fd in (r.memory_fd, r.event_fd)]
        return rings + ([] if self.ranks is None else self.ranks.descriptors)

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> "EngineArguments":
        parser = argparse.ArgumentParser(description="The engine process; started by the worker.")
        parser.add_argument("--config", required=True, type=EngineConfig.from_json, metavar="JSON")
        for name in ("--commands", "--events"):
            parser.add_argument(
                name, required=True, type=RingHandle.parse, metavar="FD:FD:CAPACITY"
            )
        parser.add_argument("--front", required=True, type=int, metavar="PID")
        parser.add_argument("--ranks", type=LeaderArguments.parse, metavar="FD:FD:CAPACITY,...")
        given = parser.parse_args(argv)
        return cls(given.config, given.commands, given.events, given.front, given.ranks)


class EngineChannel:
    """Commands in, events out."""

    def __init__(self, commands: Ring, events: Ring) -> None:
        self._commands = commands
        self._events = events
        self._codec = Codec()

    @classmethod
    def from_arguments(cls, arguments: EngineArguments) -> "EngineChannel":
        """Attach to the rings; from now on die with the front, and say where threads stand."""
        die_with(arguments.front_pid)
        faulthandler.register(STANDING_SIGNAL)
        return cls(Ring.attach(*arguments.commands), Ring.attach(*arguments.events))

    def receive(self, timeout_s: float) -> list[Command]:
        """What the front sent since the last call; waits for the first of it up to `timeout_s`."""
        if timeout_s > 0:
            self._commands.wait(timeout_s)
        records = self._commands.read_all()
        return [c for record in records for c in self._codec.decode_commands(record)]

    def send(self, events: Sequence[Event]) -> None:
        """Send events as one message; raises FrontGone if the front leaves no room for them."""
        try:
            self._events.write(self._codec.encode(events), SEND_TIMEOUT_S)
        except RingFull as error:
            raise FrontGone(f"the front does not read: {error}") from error

    def close(self) -> None:
        self._commands.close()
        self._events.close()


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it died before the call above
        raise FrontGone(f"the front, process {parent_pid}, is gone")
