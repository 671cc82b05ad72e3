"""A tensor-parallel rank that schedules nothing, and runs out of memory in its first step."""

from unittest.mock import patch

import torch

from lorry.worker import rank_process
from lorry.worker.following_rank import FollowingRank
from lorry.worker.rank_messages import RankMessage, RunStep

handle = FollowingRank.handle


def fail_in_a_step(rank: FollowingRank, message: RankMessage) -> bool:
    if isinstance(message, RunStep):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return handle(rank, message)


if __name__ == "__main__":
    with patch.object(FollowingRank, "handle", fail_in_a_step):
        rank_process.main()
