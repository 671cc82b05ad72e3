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
        weights = LoraWeights(pool, tables, layer, module, tiles.owner_N)
        y_NMR = weights.shrink(x_NMI)
        scatter_add_rows(out_TO, tiles.row_NM, weights.expand(y_NMR, out_TO.shape[1]))


class LoraWeights:
    """One module's weights, for the adapter of each tile; gathers rows from the pool's pages."""

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
        self._rank_N = tables.rank_S[slot_N] * present_N
        self._max_rank = int(self._rank_N.max())
        self._scale_N = tables.scale_SLX[slot_N, layer, index]

    def shrink(self, x_NMI: torch.Tensor, *, ways: int = 1) -> torch.Tensor:
        """``scale * (x A^T)`` in float32, ``[N, M, R]``; zero beyond each adapter's rank.

        `ways` is over how many ranks the rows of A are dealt out: R is of this rank's rows.
        """
        rank_N, max_rank = -(-self._rank_N // ways), -(-self._max_rank // ways)
        a_NRI = self._rows(self._a_offset_N, x_NMI.shape[2], rank_N, max_rank)
        return x_NMI @ a_NRI.transpose(1, 2) * self._scale_N[:, None, None]

    def expand(self, y_NMR: torch.Tensor, width: int) -> torch.Tensor:
        """``y B^T`` in float32, ``[N, M, O]``, for `width` columns of the output."""
        return y_NMR[..., : self._max_rank] @ self._rows(
            self._b_offset_N, width, self._rank_N, self._max_rank
        )

    def _rows(
        self, offset_N: torch.Tensor, width: int, rank_N: torch.Tensor, max_rank: int
    ) -> torch.Tensor:
        """``[N, R, width]`` in float32, zero beyond `rank_N`."""
        layout = self._pool.layout
        row_units = -(-width // layout.row_unit)
        in_rank_NR = torch.arange(max_rank, device=rank_N.device) < rank_N[:, None]
        unit_RU = torch.arange(max_rank * row_units, device=offset_N.device).view(-1, row_units)
        unit_NRU = offset_N[:, None, None] + unit_RU
        unit_NRU = unit_NRU.masked_fill(~in_rank_NR[..., None], 0)
        page_NRU = unit_NRU // layout.slice_units
        page_NRU = self._page_NP.gather(1, page_NRU.flatten(1)).view_as(page_NRU)
        slice_NRU = page_NRU * self._pool.layers + self._layer
        units = self._pool.slices.view(-1, layout.row_unit)
        flat = slice_NRU * layout.slice_units + unit_NRU % layout.slice_units
        rows = units.index_select(0, flat.flatten())
        rows = rows.view(*flat.shape[:2], row_units * layout.row_unit)[..., :width]
        return rows.float().masked_fill(~in_rank_NR[..., None], 0)
