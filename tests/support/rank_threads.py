"""An engine of several tensor-parallel ranks, each a thread of this process, over real gloo."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import HashStore

from lorry.rpc.base_model import BaseModel
from lorry.worker.building import Ranks, build_engine, build_following_rank
from lorry.worker.collectives import join_by_gloo
from lorry.worker.config import EngineConfig
from lorry.worker.engine import Engine
from lorry.worker.leading_runner import LeadingRunner
from lorry.worker.rank_messages import RankCodec, RankMessage
from tests.support.engines import EngineHarness


class ThreadLink:
    """Messages as they cross a ring: encoded."""

    def __init__(self) -> None:
        self.records: queue.Queue[bytes] = queue.Queue()
        self._codec = RankCodec()

    def send(self, message: RankMessage) -> None:
        self.records.put(self._codec.encode(message))


class RankHarness(EngineHarness):
    """Close it, so that the ranks end."""

    def __init__(self, model: Path, image_directory: Path, **config: Any) -> None:
        self.failures: list[BaseException] = []
        super().__init__(model, image_directory, **config)

    def build(self, config: EngineConfig, base_model: BaseModel) -> Engine:
        store, size = HashStore(), config.tensor_parallel
        links = [ThreadLink() for _ in range(1, size)]
        self._threads = [
            threading.Thread(
                target=self._follow, args=(config, base_model, store, rank, link), daemon=True
            )
            for rank, link in enumerate(links, 1)
        ]
        for thread in self._threads:
            thread.start()
        collectives = join_by_gloo(store, rank=0, size=size)
        return build_engine(config, base_model, Ranks(links, collectives))

    def close(self) -> None:
        runner = self.engine.runner
        assert isinstance(runner, LeadingRunner)
        runner.end()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not self.failures

    def _follow(
        self,
        config: EngineConfig,
        base_model: BaseModel,
        store: HashStore,
        rank: int,
        link: ThreadLink,
    ) -> None:
        try:
            collectives = join_by_gloo(store, rank=rank, size=config.tensor_parallel)
            follower = build_following_rank(config, base_model, rank, collectives)
            codec = RankCodec()
            while follower.handle(codec.decode(link.records.get(timeout=60))):
                pass
        except BaseException as error:
            self.failures.append(error)
            raise


@contextlib.contextmanager
def rank_harness(model: Path, image_directory: Path, **config: Any) -> Iterator[RankHarness]:
    with contextlib.closing(RankHarness(model, image_directory, **config)) as harness:
        yield harness
