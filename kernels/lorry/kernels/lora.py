"""LoRA of a batch whose rows use adapters of different ranks, read from the pages of the pool.

S-LoRA's MBGMV and MBGMM (arXiv 2311.03285, section 5): no padding of weights to a common rank, no
copy of weights before use. Shape suffixes: T = rows of the step, N = tiles, M = rows of a tile,
R = largest rank in the step, I = input width, O = output width, S = slots, P = pages of an adapter,
L = layers, X = modules (in the order of MODULES), U = row units of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorry.kernels.page_layout import MODULES
from lorry.kernels.pool_view import PoolView
from lorry.kernels.tiles import RowTiles, gather_rows, scatter_add_rows

ABSENT = -1  # the offset of a module that the adapter does not have


@dataclass(frozen=True, slots=True)
class AdapterTables:
    """What the kernels know of the resident adapters, by slot."""

    page_SP: torch.Tensor  # int32
    rank_S: torch.Tensor  # int32
    a_offset_SX: torch.Tensor  # int32, row units into a layer's virtual space, or ABSENT
    b_offset_SX: torch.Tensor  # int32
    scale_SLX: torch.Tensor  # float32, 0 where the layer has no such module


def lora_reference(
    x_TI: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    modules: Sequence[str],
    pool: PoolView,
    tables: AdapterTables,
    layer: int,
    tiles: RowTiles,
) -> None:
    """Add ``scale * (x A^T) B^T`` of each row's adapter to `outputs`, one [T, O] for each module.

    `modules` read the same input. A tile's owner is its slot; rows without adapter are in no tile.
    The product with A is kept in float32, and so is the sum before it is added.
    """
    if tiles.owner_N.numel() == 0:
        return
    x_NMI = gather_rows(x_TI, tiles.row_NM).float()
    for module, out_TO in zip(modules, outputs, strict=True):
        weights = _WeightReader(pool, tables, layer, module, tiles.owner_N)
        y_NMR = x_NMI @ weights.rows_of_a(x_TI.shape[1]).transpose(1, 2)
        y_NMR = y_NMR * weights.scale_N[:, None, None]
        scatter_add_rows(out_TO, tiles.row_NM, y_NMR @ weights.rows_of_b(out_TO.shape[1]))


class _WeightReader:
    """Gathers the rows of one module's weights for the adapter of each tile."""

    def __init__(
        self,
        pool: PoolView,
        tables: AdapterTables,
        layer: int,
        module: str,
        slot_N: torch.Tensor,
    ) -> None:
        index = MODULES.index(module)
        self._pool, self._layer = pool, layer
        self._page_NP = tables.page_SP[slot_N].long()
        self._a_offset_N = tables.a_offset_SX[slot_N, index].long()
        self._b_offset_N = tables.b_offset_SX[slot_N, index].long()
        present_N = self._a_offset_N != ABSENT
        rank_N = tables.rank_S[slot_N] * present_N
        rank_R = torch.arange(int(rank_N.max()), device=rank_N.device)
        self._in_rank_NR = rank_R < rank_N[:, None]
        self.scale_N = tables.scale_SLX[slot_N, layer, index]

    def rows_of_a(self, width: int) -> torch.Tensor:
        """``[N, R, I]`` in float32, zero beyond each adapter's rank."""
        return self._rows(self._a_offset_N, width)

    def rows_of_b(self, width: int) -> torch.Tensor:
        """Transposed B, ``[N, R, O]`` in float32, zero beyond each adapter's rank."""
        return self._rows(self._b_offset_N, width)

    def _rows(self, offset_N: torch.Tensor, width: int) -> torch.Tensor:
        layout = self._pool.layout
        row_units = -(-width // layout.row_unit)
        num_rows = self._in_rank_NR.shape[1]
        unit_RU = torch.arange(num_rows * row_units, device=offset_N.device).view(-1, row_units)
        unit_NRU = offset_N[:, None, None] + unit_RU
        unit_NRU = unit_NRU.masked_fill(~self._in_rank_NR[..., None], 0)
        page_NRU = unit_NRU // layout.slice_units
        page_NRU = self._page_NP.gather(1, page_NRU.flatten(1)).view_as(page_NRU)
        slice_NRU = page_NRU * self._pool.layers + self._layer
        units = self._pool.slices.view(-1, layout.row_unit)
        flat = slice_NRU * layout.slice_units + unit_NRU % layout.slice_units
        rows = units.index_select(0, flat.flatten())
        rows = rows.view(*flat.shape[:2], row_units * layout.row_unit)[..., :width]
        return rows.float().masked_fill(~self._in_rank_NR[..., None], 0)
