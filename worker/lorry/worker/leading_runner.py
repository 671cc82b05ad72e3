"""The first tensor-parallel rank's runner: it does its own part and tells the others theirs."""

from collections.abc import Sequence
from typing import Protocol

from lorry.kernels.pool_view import PoolView
from lorry.worker.adapter_memory import AdapterMemory, FinishedLoad
from lorry.worker.host_images import map_file
from lorry.worker.messages import ImageReady
from lorry.worker.plan import Batch
from lorry.worker.rank_messages import (
    EndRank,
    FinishLoads,
    LoadAdapter,
    MapImage,
    RankMessage,
    RunStep,
    UnmapImage,
)
from lorry.worker.residency import Adapter
from lorry.worker.runner import RankRunner, ReadTokens, RunCounts
from lorry.worker.sequences import SequenceTable


class RankLink(Protocol):
    """The way to another rank."""

    def send(self, message: RankMessage) -> None: ...


class LeadingRunner:
    """See `Runner`. All ranks do the same in the same order, so that their collectives meet."""

    def __init__(self, local: RankRunner, links: Sequence[RankLink]) -> None:
        self.max_in_flight = local.max_in_flight
        self.adapters: AdapterMemory = LeadingAdapterMemory(local.adapters, links)
        self.local = local
        self._links = links

    @property
    def counts(self) -> RunCounts:
        return self.local.counts

    def launch(self, batch: Batch, table: SequenceTable) -> ReadTokens:
        work = self.local.prepare(batch, table)
        tell(self._links, RunStep(work))
        return self.local.run(work)

    def end(self) -> None:
        """Tell the others that nothing comes any more."""
        tell(self._links, EndRank())


class LeadingAdapterMemory:
    """See `AdapterMemory`."""

    def __init__(self, local: AdapterMemory, links: Sequence[RankLink]) -> None:
        self.pool: PoolView = local.pool
        self._local = local
        self._links = links

    def map(self, image: ImageReady) -> None:
        """Also looks at the other ranks' files, so that they find no error that this one does not.

        Raises OSError or ValueError.
        """
        others = list(image.of_other_ranks())
        for other in others:
            if len(map_file(other.path)) < other.offset + other.image_bytes:
                raise ValueError(f"{other.path} ends before the image's {other.image_bytes} bytes")
        self._local.map(image)
        for link, other in zip(self._links, others, strict=True):
            link.send(MapImage(other))

    def unmap(self, version: bytes) -> None:
        self._local.unmap(version)
        tell(self._links, UnmapImage(version))

    def begin_load(self, adapter: Adapter) -> None:
        tell(self._links, LoadAdapter(adapter.version, adapter.slot, adapter.pages))
        self._local.begin_load(adapter)

    def finished_loads(self) -> list[FinishedLoad]:
        finished = self._local.finished_loads()
        if finished:
            tell(self._links, FinishLoads(len(finished)))
        return finished


def tell(links: Sequence[RankLink], message: RankMessage) -> None:
    for link in links:
        link.send(message)
