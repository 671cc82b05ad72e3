"""The process of a tensor-parallel rank that schedules nothing.

``python -m lorry.worker.rank_process``, started by the worker's front.
"""

import faulthandler
import logging
import os
from collections.abc import Iterator
from typing import NoReturn

from lorry.rpc.base_model import read_base_model
from lorry.worker.building import build_following_rank
from lorry.worker.engine_channel import STANDING_SIGNAL, die_with
from lorry.worker.engine_faults import explain
from lorry.worker.following_rank import FollowingRank
from lorry.worker.meeting import meet
from lorry.worker.rank_arguments import MAX_REASON_BYTES, RankArguments
from lorry.worker.rank_link import receive
from lorry.worker.rank_messages import RankMessage
from lorry.worker.ring import Ring
from lorry.worker.vital_sign import beating

log = logging.getLogger("lorry.worker.rank_process")  # __name__ is __main__ here


def follow(follower: FollowingRank, messages: Iterator[RankMessage]) -> None:
    """Do as told until told that nothing comes any more."""
    for message in messages:
        if not follower.handle(message):
            return


def end(code: int) -> NoReturn:
    """Leave: what waits for other ranks, or holds graphs of theirs, would delay an orderly end."""
    logging.shutdown()
    os._exit(code)


def main() -> None:
    arguments = RankArguments.parse()
    rank, config = arguments.rank, arguments.config
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s"
    )
    faulthandler.enable()
    faulthandler.register(STANDING_SIGNAL)
    die_with(arguments.front_pid)
    ring = Ring.attach(*arguments.messages)
    with beating(arguments.vital_fd):
        try:
            collectives = meet(arguments.port, config, rank=rank)
            base_model = read_base_model(config.model)
            follow(build_following_rank(config, base_model, rank, collectives), receive(ring))
            end(0)
        except Exception as error:
            reason = explain(error)
            log.error("%s", reason or "a defect of the engine", exc_info=error)
            text = reason or f"{type(error).__name__}: {error}"
            os.write(arguments.reason_fd, text.encode()[:MAX_REASON_BYTES])
            end(1)


if __name__ == "__main__":
    main()
