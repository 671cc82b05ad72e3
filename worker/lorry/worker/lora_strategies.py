"""How tensor-parallel ranks add LoRA to the products that they share.

- Replicated: A of q, k, v, gate and up, and B of o and down, are on every rank. No rank waits for
  another: the partial product of o and down goes through B before the base's own sum of ranks.
- S-LoRA (arXiv 2311.03285, section 6): no weight is on two ranks. Products with A of q, k and v, or
  of gate and up, are gathered in one call; those of o and down are summed; and each rank adds its
  columns of the result to its part of the base's sum.

Shape suffixes as in `lorry.kernels.lora`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from lorry.kernels.lora import AdapterTables, LoraWeights, lora_reference
from lorry.kernels.page_layout import GROUPS, ROW_PARALLEL, PageLayout, TpStrategy
from lorry.kernels.partition import Partition
from lorry.kernels.pool_view import PoolView
from lorry.kernels.tiles import RowTiles, gather_rows, scatter_add_rows
from lorry.worker.collectives import Collectives


class LoraStrategy(Protocol):
    def add(
        self,
        x_TI: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        group: int,
        pool: PoolView,
        tables: AdapterTables,
        layer: int,
        tiles: RowTiles,
    ) -> None:
        """Add each row's adapter to this rank's `outputs`, one for each module of the group."""
        ...


def lora_strategy(layout: PageLayout, collectives: Collectives) -> LoraStrategy:
    """The one by which the adapters of `layout` are cut."""
    if layout.tp_strategy is TpStrategy.SLORA:
        return FullySharded(layout, collectives)
    return Replicated()


class Replicated:
    """Also of a rank that is alone; see `LoraStrategy`."""

    def add(
        self,
        x_TI: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        group: int,
        pool: PoolView,
        tables: AdapterTables,
        layer: int,
        tiles: RowTiles,
    ) -> None:
        lora_reference(x_TI, outputs, GROUPS[group], pool, tables, layer, tiles)


class FullySharded:
    """S-LoRA's; see `LoraStrategy`."""

    def __init__(self, layout: PageLayout, collectives: Collectives) -> None:
        self._size = layout.tp_size
        self._collectives = collectives
        partition = Partition(layout)
        # Of the residual stream that is split nowhere else.
        self._columns = partition.adapter_outputs("o_proj").indices

    def add(
        self,
        x_TI: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        group: int,
        pool: PoolView,
        tables: AdapterTables,
        layer: int,
        tiles: RowTiles,
    ) -> None:
        if tiles.owner_N.numel() == 0:
            return
        modules = GROUPS[group]
        weights = [LoraWeights(pool, tables, layer, m, tiles.owner_N) for m in modules]
        x_NMI = gather_rows(x_TI, tiles.row_NM).float()
        if ROW_PARALLEL.issuperset(modules):
            intermediates = [self._collectives.all_reduce(w.shrink(x_NMI)) for w in weights]
            outputs = [out_TO[:, self._columns] for out_TO in outputs]
        else:
            intermediates = self._gather([w.shrink(x_NMI, ways=self._size) for w in weights])
        for w, y_NMR, out_TO in zip(weights, intermediates, outputs, strict=True):
            scatter_add_rows(out_TO, tiles.row_NM, w.expand(y_NMR, out_TO.shape[1]))

    def _gather(self, local: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The whole intermediates, each ``[N, M, R]`` from this rank's share, by one call.

        Rows of A are dealt out one by one, so row i of rank k is row ``i * ranks + k`` whatever the
        adapter's rank. Rows beyond it are zero.
        """
        gathered = self._collectives.all_gather(torch.cat(list(local), dim=2))
        parts = gathered.split([y.shape[2] for y in local], dim=3)
        return [part.permute(1, 2, 3, 0).flatten(2) for part in parts]
