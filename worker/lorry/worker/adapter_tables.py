"""The tables by which kernels find resident adapters, of a fixed size on the pool's device.

Shape suffix: U = table words that a change writes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lorry.kernels.lora import ABSENT, AdapterTables
from lorry.kernels.page_layout import MODULES, PageLayout
from lorry.worker.residency import Adapter

WORD = np.dtype(np.int32)
ALIGNMENT_WORDS = 32  # of each table's start, as kernels like it


def slot_bytes(layout: PageLayout, max_rank: int) -> int:
    """Bytes of a slot in all tables, at most."""
    return sum(_slot_widths(layout, layout.pages(MODULES, max_rank))) * WORD.itemsize


def _slot_widths(layout: PageLayout, pages: int) -> tuple[int, ...]:
    """Words of a slot in each table; an adapter has up to `pages` pages."""
    modules = len(MODULES)
    return pages, 1, modules, modules, layout.geometry.layers * modules


class TableChange(NamedTuple):
    """An adapter's slot: where its words are in the buffer, and what they become."""

    place_U: np.ndarray  # int64
    word_U: np.ndarray  # int32; scales are float32 in the same bits


class TableBuffer:
    """Tables for adapters of up to `max_rank`, in one buffer, so that one write fills a slot."""

    def __init__(
        self, layout: PageLayout, *, num_slots: int, max_rank: int, device: torch.device
    ) -> None:
        layers, modules = layout.geometry.layers, len(MODULES)
        self._widths = _slot_widths(layout, min(layout.pages(MODULES, max_rank), num_slots))
        sizes = [-(-num_slots * width // ALIGNMENT_WORDS) for width in self._widths]
        starts = np.cumsum([0, *sizes]) * ALIGNMENT_WORDS
        self._starts = starts[:-1].tolist()
        self._words = torch.zeros(int(starts[-1]), dtype=torch.int32, device=device)
        page, rank, a_offset, b_offset, scale = (
            self._words[start : start + num_slots * width].view(num_slots, width)
            for start, width in zip(self._starts, self._widths, strict=True)
        )
        self.tables = AdapterTables(
            page_SP=page,
            rank_S=rank[:, 0],
            a_offset_SX=a_offset.fill_(ABSENT),
            b_offset_SX=b_offset.fill_(ABSENT),
            scale_SLX=scale.view(torch.float32).view(num_slots, layers, modules),
        )

    def change(self, adapter: Adapter) -> TableChange:
        """What describes `adapter`, which has pages and a slot; any thread may ask."""
        image = adapter.image
        assert image is not None
        a_offset = np.full(len(MODULES), ABSENT, dtype=WORD)
        b_offset = a_offset.copy()
        scale_XL = np.zeros((len(MODULES), self._widths[-1] // len(MODULES)), dtype=np.float32)
        for module in image.modules:
            index = MODULES.index(module.name)
            a_offset[index], b_offset[index] = module.row_offset, module.b_row_offset
            scale_XL[index] = module.scale_per_layer
        scale = np.ascontiguousarray(scale_XL.T).view(WORD).ravel()
        parts = [np.array(adapter.pages, dtype=WORD), np.array([image.rank], dtype=WORD)]
        parts += [a_offset, b_offset, scale]
        place = [
            start + adapter.slot * width + np.arange(len(part))
            for start, width, part in zip(self._starts, self._widths, parts, strict=True)
        ]
        return TableChange(np.concatenate(place), np.concatenate(parts))

    def write(self, changes: Sequence[TableChange]) -> None:
        """Apply changes of different slots, in the order of the current stream, by one copy."""
        place_U, word_U = (np.concatenate(parts) for parts in zip(*changes, strict=True))
        host = torch.empty(
            place_U.nbytes + word_U.nbytes, dtype=torch.uint8, pin_memory=self._words.is_cuda
        )
        host.numpy()[: place_U.nbytes] = place_U.view(np.uint8)
        host.numpy()[place_U.nbytes :] = word_U.view(np.uint8)
        packed = host.to(self._words.device, non_blocking=True)
        place, word = packed[: place_U.nbytes], packed[place_U.nbytes :]
        self._words[place.view(torch.int64)] = word.view(torch.int32)
