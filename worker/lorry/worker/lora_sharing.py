"""What tensor-parallel ranks tell each other of the products with A, between the Triton kernels.

The strategies are those of `lorry.worker.lora_strategies`. Shape suffixes as in
`lorry.kernels.lora_plan`, S = partial sums of a product, K = ranks, O = output width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from lorry.kernels.page_layout import GROUPS, ROW_PARALLEL, PageLayout, TpStrategy
from lorry.kernels.partition import Partition
from lorry.worker.collectives import Collectives


class ExpandInput(NamedTuple):
    """What the products with B read, and where they are added."""

    y: torch.Tensor  # [S or K, T, Y]
    outputs: Sequence[torch.Tensor]  # [T, O] of each module


class LoraSharing(Protocol):
    def share(
        self, y_STY: torch.Tensor, outputs: Sequence[torch.Tensor], group: int
    ) -> ExpandInput:
        """Of this rank's products with A of the group's modules."""
        ...


def lora_sharing(layout: PageLayout, collectives: Collectives, *, max_rank: int) -> LoraSharing:
    """The one by which the adapters of `layout` are cut."""
    if layout.tp_strategy is TpStrategy.SLORA:
        return SharedProducts(layout, collectives, max_rank=max_rank)
    return OwnProducts()


class OwnProducts:
    """Of a rank that is alone, or of replicated adapters; see `LoraSharing`."""

    def share(
        self, y_STY: torch.Tensor, outputs: Sequence[torch.Tensor], group: int
    ) -> ExpandInput:
        return ExpandInput(y_STY, outputs)


class SharedProducts:
    """S-LoRA's; see `LoraSharing`. Columns beyond an adapter's rank hold anything."""

    def __init__(self, layout: PageLayout, collectives: Collectives, *, max_rank: int) -> None:
        self._collectives = collectives
        self._columns = Partition(layout).adapter_outputs("o_proj").indices
        self._width_G = [
            sum(layout.a_rows(module, max_rank) for module in group) for group in GROUPS
        ]

    def share(
        self, y_STY: torch.Tensor, outputs: Sequence[torch.Tensor], group: int
    ) -> ExpandInput:
        y_TY = y_STY[:, :, : self._width_G[group]].sum(dim=0)
        if ROW_PARALLEL.issuperset(GROUPS[group]):
            outputs = [out_TO[:, self._columns] for out_TO in outputs]
            return ExpandInput(self._collectives.all_reduce(y_TY)[None], outputs)
        return ExpandInput(self._collectives.all_gather(y_TY), outputs)
