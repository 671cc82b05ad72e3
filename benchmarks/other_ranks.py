"""Tensor-parallel ranks of an engine that runs in this very process, without a worker's front.

A rank that fails ends this process, too, which would wait for it in a collective: both say where
they were.
"""

import contextlib
import faulthandler
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from lorry.worker.building import Ranks
from lorry.worker.config import EngineConfig
from lorry.worker.leading_runner import tell
from lorry.worker.meeting import meet
from lorry.worker.rank_arguments import RankArguments
from lorry.worker.rank_link import RingLink
from lorry.worker.rank_messages import EndRank
from lorry.worker.ranks import RANK_COMMAND
from lorry.worker.ring import Ring

END_S = 20.0
FAILED = 70  # exit code


@contextlib.contextmanager
def other_ranks(
    config: EngineConfig, command: Sequence[str] = RANK_COMMAND
) -> Iterator[Ranks | None]:
    """All ranks but the first, run by `command`, while the block runs; None if there are none."""
    size = config.tensor_parallel
    if size == 1:
        yield None
        return
    with contextlib.ExitStack() as stack:
        rings = [stack.enter_context(contextlib.closing(Ring.create())) for _ in range(1, size)]
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        for rank, ring in enumerate(rings, 1):
            stack.enter_context(_rank_process(config, rank, ring, port, command))
        collectives = meet(port, config, rank=0, listening_fd=listening.detach())
        links = [RingLink(ring) for ring in rings]
        stack.callback(tell, links, EndRank())
        yield Ranks(links, collectives)


@contextlib.contextmanager
def _rank_process(
    config: EngineConfig, rank: int, ring: Ring, port: int, command: Sequence[str]
) -> Iterator[None]:
    vital_fd, reason_fd = os.eventfd(0, os.EFD_NONBLOCK), os.dup(sys.stderr.fileno())
    arguments = RankArguments(config, rank, ring.handle, vital_fd, reason_fd, port, os.getpid())
    process = subprocess.Popen(
        [*command, *arguments.to_argv()],
        stdin=subprocess.DEVNULL,
        pass_fds=arguments.descriptors,
    )
    threading.Thread(target=_end_with, args=(process, rank), daemon=True).start()
    try:
        yield
    finally:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(vital_fd)
        os.close(reason_fd)


def _end_with(process: "subprocess.Popen[bytes]", rank: int) -> None:
    code = process.wait()
    if code:
        print(f"rank {rank} ended with exit code {code}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr.fileno())
        os._exit(FAILED)
