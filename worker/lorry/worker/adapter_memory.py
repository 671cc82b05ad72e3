"""The resident adapters' weights in the pool and the tables by which kernels find them."""

import mmap
import os

import numpy as np
import torch

from lorry.kernels.lora import ABSENT, AdapterTables
from lorry.kernels.page_layout import MODULES
from lorry.kernels.pool_view import PoolView
from lorry.worker.messages import ImageReady
from lorry.worker.residency import Adapter


class HostImages:
    """Page images of the front's shared-memory files, mapped until they are released."""

    def __init__(self) -> None:
        self._maps: dict[bytes, mmap.mmap] = {}

    def map(self, image: ImageReady) -> None:
        """Map a file; raises OSError or ValueError if it is not as announced."""
        descriptor = os.open(image.path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            # Private and writable, because torch takes no read-only memory; nobody writes.
            self._maps[image.version] = mmap.mmap(
                descriptor,
                image.offset + image.image_bytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(descriptor)

    def bytes_of(self, image: ImageReady) -> torch.Tensor:
        """The image as uint8; drop the tensor before `unmap`."""
        return torch.frombuffer(
            self._maps[image.version],
            dtype=torch.uint8,
            count=image.image_bytes,
            offset=image.offset,
        )

    def unmap(self, version: bytes) -> None:
        self._maps.pop(version).close()


class AdapterMemory:
    """Copies images into pages and fills in the tables, which grow with the largest slot."""

    def __init__(self, pool: PoolView) -> None:
        self._pool = pool
        layers = pool.layers
        self._page_SP = np.zeros((1, 1), dtype=np.int32)
        self._rank_S = np.zeros(1, dtype=np.int32)
        self._a_offset_SX = np.full((1, len(MODULES)), ABSENT, dtype=np.int32)
        self._b_offset_SX = np.full((1, len(MODULES)), ABSENT, dtype=np.int32)
        self._scale_SLX = np.zeros((1, layers, len(MODULES)), dtype=np.float32)
        self.tables = self._as_tables()

    def load(self, adapter: Adapter, image_bytes: torch.Tensor) -> None:
        """Copy an image into the adapter's pages and describe it in its slot."""
        assert adapter.image is not None
        pages = self._pool.slices.view(torch.uint8).view(-1, self._pool.layout.page_bytes)
        index = torch.tensor(adapter.pages, device=pages.device)
        pages[index] = image_bytes.view(len(adapter.pages), -1).to(pages.device)
        self._grow(adapter.slot + 1, len(adapter.pages))
        self._describe(adapter.slot, adapter.pages, adapter.image)
        self.tables = self._as_tables()

    def _describe(self, slot: int, pages: list[int], image: ImageReady) -> None:
        self._page_SP[slot, : len(pages)] = pages
        self._rank_S[slot] = image.rank
        self._a_offset_SX[slot] = self._b_offset_SX[slot] = ABSENT
        self._scale_SLX[slot] = 0
        for module in image.modules:
            index = MODULES.index(module.name)
            self._a_offset_SX[slot, index] = module.row_offset
            self._b_offset_SX[slot, index] = module.b_row_offset
            self._scale_SLX[slot, :, index] = module.scale_per_layer

    def _grow(self, slots: int, pages: int) -> None:
        have_slots, have_pages = self._page_SP.shape
        more = 0 if slots <= have_slots else max(slots, 2 * have_slots) - have_slots
        wider = max(0, pages - have_pages)
        self._page_SP = np.pad(self._page_SP, ((0, more), (0, wider)))
        if more:
            self._rank_S = np.pad(self._rank_S, (0, more))
            self._a_offset_SX = np.pad(self._a_offset_SX, ((0, more), (0, 0)))
            self._b_offset_SX = np.pad(self._b_offset_SX, ((0, more), (0, 0)))
            self._scale_SLX = np.pad(self._scale_SLX, ((0, more), (0, 0), (0, 0)))

    def _as_tables(self) -> AdapterTables:
        device = self._pool.slices.device
        return AdapterTables(
            *(
                torch.from_numpy(array).to(device)
                for array in (
                    self._page_SP,
                    self._rank_S,
                    self._a_offset_SX,
                    self._b_offset_SX,
                    self._scale_SLX,
                )
            )
        )
