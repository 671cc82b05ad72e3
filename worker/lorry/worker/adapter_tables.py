"""The tables by which kernels find resident adapters, of a fixed size on the pool's device."""

import torch

from lorry.kernels.lora import ABSENT, AdapterTables
from lorry.kernels.page_layout import MODULES, PageLayout
from lorry.worker.residency import Adapter


def allocate_tables(
    layout: PageLayout, *, num_slots: int, max_rank: int, device: torch.device
) -> AdapterTables:
    """Tables for adapters of all modules up to `max_rank`."""
    layers, modules = layout.geometry.layers, len(MODULES)
    pages = min(layout.pages(MODULES, max_rank), num_slots)

    def table(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, fill, dtype=dtype, device=device)

    return AdapterTables(
        page_SP=table(num_slots, pages),
        rank_S=table(num_slots),
        a_offset_SX=table(num_slots, modules, fill=ABSENT),
        b_offset_SX=table(num_slots, modules, fill=ABSENT),
        scale_SLX=table(num_slots, layers, modules, dtype=torch.float32),
    )


def describe(tables: AdapterTables, adapter: Adapter) -> None:
    """Fill in an adapter's slot, in the order of the current stream."""
    image, slot = adapter.image, adapter.slot
    assert image is not None
    a_offset = torch.full((len(MODULES),), ABSENT, dtype=torch.int32)
    b_offset = a_offset.clone()
    scale = torch.zeros(tables.scale_SLX.shape[1:], dtype=torch.float32)
    for module in image.modules:
        index = MODULES.index(module.name)
        a_offset[index], b_offset[index] = module.row_offset, module.b_row_offset
        scale[:, index] = torch.tensor(module.scale_per_layer)
    pages = torch.tensor(adapter.pages, dtype=torch.int32)
    tables.page_SP[slot, : len(pages)].copy_(pages, non_blocking=True)
    tables.rank_S[slot].fill_(image.rank)
    tables.a_offset_SX[slot].copy_(a_offset, non_blocking=True)
    tables.b_offset_SX[slot].copy_(b_offset, non_blocking=True)
    tables.scale_SLX[slot].copy_(scale, non_blocking=True)
