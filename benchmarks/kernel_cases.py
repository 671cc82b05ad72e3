"""Model shapes, batches and adapters on which kernels are measured, in one pool of random bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.timing import copy_bytes_per_s, matmul_flops_per_s
from lorry.kernels.lora import AdapterTables
from lorry.kernels.page_layout import (
    MODULES,
    PAGE_TOKENS,
    Dtype,
    ModelGeometry,
    PageLayout,
)
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView

GEOMETRIES = {
    "llama-2-7b": ModelGeometry(
        layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008
    ),
    "llama-3-8b": ModelGeometry(
        layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336
    ),
}
FILL_ELEMENTS = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, its measured ceilings, and a pool of random bytes for each model."""

    device: torch.device
    bytes_per_s: float
    flops_per_s: float
    pools: dict[str, PoolView]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Time of one launch and the least that its bytes and operations take."""

    name: str
    us: float
    num_bytes: float
    flops: float = 0.0

    def floor_us(self, device: Device) -> float:
        return 1e6 * max(self.num_bytes / device.bytes_per_s, self.flops / device.flops_per_s)


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's rows as kernels read them."""

    sequence_T: torch.Tensor
    position_T: torch.Tensor
    block_table_SP: torch.Tensor


def open_device(pool_bytes: int) -> Device:
    """Fill the pool and measure the ceilings."""
    device = torch.device("cuda:0")
    torch.manual_seed(0)
    buffer = random_buffer(pool_bytes, device)
    return Device(
        device,
        copy_bytes_per_s(buffer),
        matmul_flops_per_s(device),
        {model: view_pool(buffer, model) for model in GEOMETRIES},
    )


def random_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes that are normal numbers as bf16."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    for part in buffer.view(torch.bfloat16).split(FILL_ELEMENTS):
        part.normal_()
    return buffer


def view_pool(buffer: torch.Tensor, model: str) -> PoolView:
    """The whole pages of `buffer` as a bf16 pool of `model`."""
    layout = PageLayout(geometry=GEOMETRIES[model], dtype=Dtype.BF16)
    pages = buffer.numel() // layout.page_bytes
    elements = buffer[: pages * layout.page_bytes].view(TORCH_DTYPES[layout.dtype])
    return PoolView(elements.view(-1, layout.slice_elements), layout)


def attention_rows(
    contexts: Sequence[int], pool: PoolView, new_tokens: int = 1, seed: int = 0
) -> Rows:
    """Sequences of `contexts` tokens, of which the last `new_tokens` are rows of the step."""
    generator = np.random.default_rng(seed)
    pages = [-(-context // PAGE_TOKENS) for context in contexts]
    chosen = generator.choice(pool.num_pages - 1, sum(pages), replace=False) + 1
    table = np.zeros((len(contexts), max(pages)), np.int32)
    for line, part in zip(table, np.split(chosen, np.cumsum(pages)[:-1]), strict=True):
        line[: len(part)] = part
    sequence = np.repeat(np.arange(len(contexts)), new_tokens)
    position = np.concatenate([np.arange(c - new_tokens, c) for c in contexts])
    device = pool.slices.device
    return Rows(
        torch.tensor(sequence, dtype=torch.int32, device=device),
        torch.tensor(position, dtype=torch.int32, device=device),
        torch.tensor(table, device=device),
    )


def adapter_tables(
    ranks: Sequence[int], targets: Sequence[str], pool: PoolView, seed: int = 0
) -> AdapterTables:
    """Adapters in random pages, one for each rank."""
    layout, device = pool.layout, pool.slices.device
    generator = np.random.default_rng(seed)
    pages = [layout.pages(targets, rank) for rank in ranks]
    chosen = generator.choice(pool.num_pages - 1, sum(pages), replace=False) + 1
    page = np.zeros((len(ranks), max(pages)), np.int32)
    a_offset = np.full((len(ranks), len(MODULES)), -1, np.int32)
    b_offset = a_offset.copy()
    for slot, part in enumerate(np.split(chosen, np.cumsum(pages)[:-1])):
        page[slot, : len(part)] = part
        for module, offsets in layout.offsets(targets, ranks[slot]).items():
            a_offset[slot, MODULES.index(module)] = offsets.a
            b_offset[slot, MODULES.index(module)] = offsets.b
    scale = np.where(a_offset >= 0, 1e-3, 0).astype(np.float32)
    scale = np.repeat(scale[:, None], layout.geometry.layers, axis=1)
    rank = np.array(ranks, np.int32)
    tensors = (page, rank, a_offset, b_offset, np.ascontiguousarray(scale))
    return AdapterTables(*(torch.tensor(tensor, device=device) for tensor in tensors))
