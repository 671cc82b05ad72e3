"""The command lines by which the front tells tensor-parallel ranks of each other."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from lorry.worker.config import EngineConfig
from lorry.worker.ring import RingHandle

MAX_REASON_BYTES = 4000  # a pipe takes as many at once


class LeaderArguments(NamedTuple):
    """What the first rank, the engine, needs beside its own arguments."""

    links: tuple[RingHandle, ...]  # to the other ranks, in their order
    vital_fd: int  # of `vital_sign`
    port: int
    listening_fd: int  # of that port

    def __str__(self) -> str:
        links = ",".join(map(str, self.links))
        return f"{links}/{self.vital_fd}/{self.port}/{self.listening_fd}"

    @classmethod
    def parse(cls, text: str) -> "LeaderArguments":
        links, *numbers = text.split("/")
        vital_fd, port, listening_fd = map(int, numbers)
        handles = tuple(RingHandle.parse(link) for link in links.split(","))
        return cls(handles, vital_fd, port, listening_fd)

    @property
    def descriptors(self) -> list[int]:
        """That the process inherits."""
        rings = [fd for link in self.links for fd in (link.memory_fd, link.event_fd)]
        return [*rings, self.vital_fd, self.listening_fd]


class RankArguments(NamedTuple):
    """The command line of any other rank's process."""

    config: EngineConfig
    rank: int
    messages: RingHandle  # from the first rank
    vital_fd: int
    reason_fd: int  # of a pipe, for why it fails
    port: int
    front_pid: int

    def to_argv(self) -> list[str]:
        return [
            f"--config={self.config.to_json()}",
            f"--rank={self.rank}",
            f"--messages={self.messages}",
            f"--vital-fd={self.vital_fd}",
            f"--reason-fd={self.reason_fd}",
            f"--port={self.port}",
            f"--front={self.front_pid}",
        ]

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> "RankArguments":
        parser = argparse.ArgumentParser(
            description="The process of a tensor-parallel rank; started by the worker."
        )
        parser.add_argument("--config", required=True, type=EngineConfig.from_json, metavar="JSON")
        parser.add_argument(
            "--messages", required=True, type=RingHandle.parse, metavar="FD:FD:CAPACITY"
        )
        for name in ("--rank", "--vital-fd", "--reason-fd", "--port", "--front"):
            parser.add_argument(name, required=True, type=int, metavar="NUMBER")
        given = parser.parse_args(argv)
        return cls(
            given.config,
            given.rank,
            given.messages,
            given.vital_fd,
            given.reason_fd,
            given.port,
            given.front,
        )

    @property
    def descriptors(self) -> list[int]:
        """That the process inherits."""
        rings = [self.messages.memory_fd, self.messages.event_fd]
        return [*rings, self.vital_fd, self.reason_fd]
