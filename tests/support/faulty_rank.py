"""A tensor-parallel rank that schedules nothing; FAULTY_RANK tells how its first step fails."""

import os
import threading
from typing import NoReturn
from unittest.mock import patch

import torch

from lorry.worker import rank_process
from lorry.worker.following_rank import FollowingRank
from lorry.worker.rank_messages import RankMessage, RunStep

FAULT = "FAULTY_RANK"

handle = FollowingRank.handle


def run_out_of_memory() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def hang() -> None:
    """As in a wait for a GPU that does not answer: the process lives, and its other threads do."""
    threading.Event().wait()


FAULTS = {"out-of-memory": run_out_of_memory, "hang": hang}


def fail_in_a_step(rank: FollowingRank, message: RankMessage) -> bool:
    if isinstance(message, RunStep):
        FAULTS[os.environ[FAULT]]()
    return handle(rank, message)


if __name__ == "__main__":
    with patch.object(FollowingRank, "handle", fail_in_a_step):
        rank_process.main()
