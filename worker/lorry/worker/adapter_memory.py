"""Brings page images into the pool: how runners load adapters."""

import time
from typing import NamedTuple, Protocol

import torch

from lorry.kernels.pool_view import PoolView
from lorry.worker.adapter_tables import TableBuffer
from lorry.worker.host_images import HostImages
from lorry.worker.messages import ImageReady
from lorry.worker.residency import Adapter


class FinishedLoad(NamedTuple):
    adapter: Adapter
    num_bytes: int
    seconds: float


class AdapterMemory(Protocol):
    """Host images and the adapters' part of the pool."""

    pool: PoolView

    def map(self, image: ImageReady) -> None:
        """Map an image's file; raises OSError or ValueError if it is not as announced."""
        ...

    def unmap(self, version: bytes) -> None:
        """Forget an image that no load uses."""
        ...

    def begin_load(self, adapter: Adapter) -> None:
        """Start to copy the adapter's image into its pages."""
        ...

    def finished_loads(self) -> list[FinishedLoad]:
        """Loads that are done since the last call; the next step may use them."""
        ...


class RankAdapterMemory(AdapterMemory, Protocol):
    """One that a tensor-parallel rank can have, whose loads the first rank counts."""

    def finish_loads(self, count: int) -> None:
        """Wait for the oldest `count` loads; the next step may use them."""
        ...


class DirectAdapterMemory:
    """Copies at once; see `RankAdapterMemory`."""

    def __init__(self, pool: PoolView, *, max_rank: int) -> None:
        self.pool = pool
        self._table_buffer = TableBuffer(
            pool.layout,
            num_slots=pool.num_pages - 1,
            max_rank=max_rank,
            device=pool.slices.device,
        )
        self.tables = self._table_buffer.tables
        self._pages = pool.slices.view(torch.uint8).view(-1, pool.layout.page_bytes)
        self._images = HostImages()
        self._finished: list[FinishedLoad] = []

    def map(self, image: ImageReady) -> None:
        self._images.map(image)

    def unmap(self, version: bytes) -> None:
        self._images.unmap(version)

    def begin_load(self, adapter: Adapter) -> None:
        started_s = time.monotonic()
        image = self._images.bytes_of(adapter.version)
        index = torch.tensor(adapter.pages, device=self._pages.device)
        self._pages[index] = image.view(len(adapter.pages), -1).to(self._pages.device)
        self._table_buffer.write([self._table_buffer.change(adapter)])
        seconds = max(time.monotonic() - started_s, 1e-9)
        self._finished.append(FinishedLoad(adapter, len(image), seconds))

    def finished_loads(self) -> list[FinishedLoad]:
        finished, self._finished = self._finished, []
        return finished

    def finish_loads(self, count: int) -> None:
        del self._finished[:count]
