"""LoRA by batched matrix products over padded copies: what S-LoRA's kernels replace.

The variant that S-LoRA calls S-LoRA-bmm (arXiv 2311.03285, section 7): every adapter of a step is
copied out of its pages into one tensor, padded to the largest rank of the step, and the rows of
each adapter are padded to the most rows that any of them has.

Shape suffixes: T = rows of the step, N = adapters of the step, M = most rows of an adapter,
R = largest rank in the step, I = input width, O = output width, U = row units of a row.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from lorry.kernels.lora import ABSENT, AdapterTables
from lorry.kernels.page_layout import BASE_MODEL, GROUPS, MODULES
from lorry.kernels.pool_view import PoolView
from lorry.kernels.tiles import RowTiles, cut_tiles, gather_rows, scatter_add_rows
from lorry.worker import step_graphs, torch_runner
from lorry.worker.operations import Projection
from lorry.worker.products import torch_linear
from lorry.worker.torch_operations import TorchOperations
from lorry.worker.triton_operations import TritonOperations


@contextlib.contextmanager
def padded_products() -> Iterator[None]:
    """While the block runs, steps that are launched kernel by kernel multiply padded copies."""
    with (
        patch.object(torch_runner, "TorchOperations", _PaddedTorchOperations),
        patch.object(step_graphs, "TritonOperations", _PaddedTritonOperations),
    ):
        yield


class _PaddedTorchOperations(TorchOperations):
    """On any device; every step copies the weights again, as the variant does."""

    def project(
        self,
        x_TI: torch.Tensor,
        base: Projection,
        group: int,
        layer: int,
        onto_TO: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        widths = self._pool.layout.geometry.group_widths(group)
        outputs = torch.split(torch_linear(x_TI, *base, onto_TO=onto_TO), widths, dim=1)
        tiles = self._step.lora_tiles
        slot_T = torch.full((len(x_TI) + 1,), BASE_MODEL, device=x_TI.device)
        slot_T[tiles.row_NM] = tiles.owner_N[:, None]  # the row after the last stands for none
        segments = segments_of(slot_T[:-1])
        add_padded(x_TI, outputs, group, self._pool, self._adapters, layer, segments)
        return outputs


class _PaddedTritonOperations(TritonOperations):
    def __init__(self, *arguments: Any, slot_T: torch.Tensor, **others: Any) -> None:
        super().__init__(*arguments, slot_T=slot_T, **others)
        self._segments = segments_of(slot_T)
        self._expand_rotates = False

    def project(
        self,
        x_TI: torch.Tensor,
        base: Projection,
        group: int,
        layer: int,
        onto_TO: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        state = self._state
        widths = state.pool.layout.geometry.group_widths(group)
        outputs = torch.split(torch_linear(x_TI, *base, onto_TO=onto_TO), widths, dim=1)
        if group in self._groups:
            add_padded(x_TI, outputs, group, state.pool, state.tables, layer, self._segments)
        return outputs


def segments_of(slot_T: torch.Tensor) -> RowTiles:
    """The rows of each adapter of a step, as one tile that is as long as the longest."""
    slots = slot_T.cpu().numpy()
    order = np.argsort(slots, kind="stable")
    owner, start, length = np.unique(slots[order], return_index=True, return_counts=True)
    is_adapter = owner != BASE_MODEL
    tiles = cut_tiles(
        owner[is_adapter],
        start[is_adapter],
        length[is_adapter],
        tile_rows=int(length[is_adapter].max(initial=1)),
        num_rows=len(slots),
    )
    row_of = torch.from_numpy(np.append(order, len(slots)))
    return RowTiles(tiles.owner_N, row_of[tiles.row_NM]).to(slot_T.device)


def add_padded(
    x_TI: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    group: int,
    pool: PoolView,
    tables: AdapterTables,
    layer: int,
    segments: RowTiles,
) -> None:
    """Add ``scale * (x A^T) B^T`` of each row's adapter to `outputs`, [T, O] of each module."""
    slot_N = segments.owner_N
    if not len(slot_N):
        return
    x_NMI = gather_rows(x_TI, segments.row_NM)
    rank_N = tables.rank_S[slot_N]
    for module, out_TO in zip(GROUPS[group], outputs, strict=True):
        index = MODULES.index(module)
        offsets = (tables.a_offset_SX[slot_N, index], tables.b_offset_SX[slot_N, index])
        module_rank_N = rank_N * (offsets[0] != ABSENT)
        widths = (x_TI.shape[1], out_TO.shape[1])
        a_NRI, b_NRO = (
            _copied(pool, tables.page_SP[slot_N], layer, offset_N, module_rank_N, rank_N, width)
            for offset_N, width in zip(offsets, widths, strict=True)
        )
        y_NMR = torch.bmm(x_NMI, a_NRI.transpose(1, 2))
        y_NMR *= tables.scale_SLX[slot_N, layer, index][:, None, None]
        scatter_add_rows(out_TO, segments.row_NM, torch.bmm(y_NMR, b_NRO))


def _copied(
    pool: PoolView,
    page_NP: torch.Tensor,
    layer: int,
    offset_N: torch.Tensor,
    module_rank_N: torch.Tensor,
    rank_N: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """A module's rows of each adapter, ``[N, R, width]``, zero beyond the adapter's own rank."""
    layout, most = pool.layout, int(rank_N.max())
    row_units = -(-width // layout.row_unit)
    unit_RU = torch.arange(most * row_units, device=offset_N.device).view(most, row_units)
    is_own_NR = torch.arange(most, device=offset_N.device) < module_rank_N[:, None]
    unit_NRU = (offset_N[:, None, None] + unit_RU).masked_fill(~is_own_NR[..., None], 0)
    place_NX = (unit_NRU // layout.slice_units).flatten(1)
    page_NRU = page_NP.long().gather(1, place_NX).view_as(unit_NRU)
    slice_NRU = page_NRU * pool.layers + layer
    unit = slice_NRU * layout.slice_units + unit_NRU % layout.slice_units
    rows = pool.slices.view(-1, layout.row_unit).index_select(0, unit.flatten())
    rows = rows.view(len(offset_N), most, row_units * layout.row_unit)[..., :width]
    return rows.masked_fill(~is_own_NR[..., None], 0)
