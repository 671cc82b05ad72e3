"""Pools, adapters and rows for kernel tests; all that no kernel may read holds NaN."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorry.kernels.lora import AdapterTables
from lorry.kernels.page_layout import (
    MODULES,
    PAGE_TOKENS,
    ROW_PARALLEL,
    Dtype,
    ModelGeometry,
    PageLayout,
    TpStrategy,
)
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView, allocate_pool
from lorry.kernels.tiles import RowTiles, cut_tiles

LAYERS = 2
LAYER = 1
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def geometry(hidden: int, heads: int, kv_heads: int, head_dim: int, width: int) -> ModelGeometry:
    return ModelGeometry(
        layers=LAYERS,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=width,
    )


GEOMETRIES = {
    "tiny": geometry(192, 6, 2, 32, 320),
    "demo": geometry(128, 4, 2, 32, 384),
    "qwen2.5-0.5b": geometry(896, 14, 2, 64, 4864),
    "qwen3-0.6b": geometry(1024, 16, 8, 128, 3072),
    "llama-2-7b": geometry(4096, 32, 32, 128, 11008),
    "llama-3-8b": geometry(4096, 32, 8, 128, 14336),
    "llama-13b": geometry(5120, 40, 40, 128, 13824),
    "llama-30b": geometry(6656, 52, 52, 128, 17920),
    "llama-70b": geometry(8192, 64, 8, 128, 28672),
}


def layout_of(name: str, dtype: torch.dtype, tp_size: int = 1) -> PageLayout:
    strategy = TpStrategy.REPLICATED if tp_size > 1 else None
    return PageLayout(
        geometry=GEOMETRIES[name], dtype=DTYPES[dtype], tp_size=tp_size, tp_strategy=strategy
    )


def mixes(num_rows: int, num_slots: int, seed: int = 0) -> dict[str, list[int]]:
    """Which adapter each row uses, in the mixes that kernels are tested and measured on."""
    generator = np.random.default_rng(seed)
    weight = 1 / np.arange(1, num_slots + 1)
    return {
        "identical": [0] * num_rows,
        "distinct": [row % num_slots for row in range(num_rows)],
        "uniform": sorted(generator.integers(-1, num_slots, num_rows).tolist()),
        "zipf": sorted(generator.choice(num_slots, num_rows, p=weight / weight.sum()).tolist()),
        "skewed": [-1, *[1] * (num_rows - 3), 0, -1],
        "none": [-1] * num_rows,
    }


@dataclass(frozen=True, slots=True)
class Adapter:
    targets: tuple[str, ...]
    rank: int


MIXED_ADAPTERS = (
    Adapter(MODULES, 3),
    Adapter(("q_proj", "v_proj"), 16),
    Adapter(MODULES[:4], 40),
    Adapter(("k_proj", "o_proj", "down_proj"), 1),
    Adapter(MODULES, 256),
)


def poisoned_pool(num_pages: int, layout: PageLayout, device: torch.device) -> PoolView:
    pool = allocate_pool(num_pages, layout, device)
    pool.slices.fill_(torch.nan)
    return pool


def store_adapters(
    adapters: Sequence[Adapter], layout: PageLayout, device: torch.device, seed: int = 0
) -> tuple[PoolView, AdapterTables]:
    """A poisoned pool with the adapters' weights in scattered pages."""
    generator = np.random.default_rng(seed)
    num_pages = [layout.pages(a.targets, a.rank) for a in adapters]
    pool = poisoned_pool(sum(num_pages) + 3, layout, device)
    shuffled = generator.permutation(np.arange(1, 1 + sum(num_pages)))
    page_SP = np.zeros((len(adapters), max(num_pages)), np.int32)
    offset_SX = np.full((2, len(adapters), len(MODULES)), -1, np.int32)
    for slot, pages in enumerate(np.split(shuffled, np.cumsum(num_pages)[:-1])):
        page_SP[slot, : len(pages)] = pages
        image = _image(adapters[slot], layout, len(pages), generator)
        rows = torch.from_numpy(pages).to(device)
        pool.pages[rows] = image.to(pool.slices)
        for module, offsets in layout.offsets(adapters[slot].targets, adapters[slot].rank).items():
            offset_SX[:, slot, MODULES.index(module)] = offsets
    scale_SLX = generator.uniform(0.5, 2, (len(adapters), LAYERS, len(MODULES)))
    scale_SLX = (scale_SLX * (offset_SX[0] >= 0)[:, None]).astype(np.float32)
    rank_S = np.array([a.rank for a in adapters], np.int32)
    arrays = (page_SP, rank_S, offset_SX[0].copy(), offset_SX[1].copy(), scale_SLX)
    return pool, AdapterTables(*(torch.from_numpy(array).to(device) for array in arrays))


def _image(
    adapter: Adapter, layout: PageLayout, num_pages: int, generator: np.random.Generator
) -> torch.Tensor:
    """Random weights where the adapter's lie, zeros in the padding of rows, NaN elsewhere."""
    virtual = np.full((LAYERS, num_pages * layout.slice_elements), np.nan, np.float32)
    for module, offsets in layout.offsets(adapter.targets, adapter.rank).items():
        widths = layout.row_widths(module)
        for start, padded, width in zip(offsets, widths, widths_of(layout, module), strict=True):
            rows = np.zeros((LAYERS, adapter.rank, padded), np.float32)
            rows[..., :width] = generator.normal(size=rows[..., :width].shape) / width**0.5
            first = start * layout.row_unit
            virtual[:, first : first + rows[0].size] = rows.reshape(LAYERS, -1)
    image = virtual.reshape(LAYERS, num_pages, layout.slice_elements)
    return torch.from_numpy(image.swapaxes(0, 1).copy())


def widths_of(layout: PageLayout, module: str) -> tuple[int, int]:
    """Elements of a row of A and of transposed B on a rank, before padding."""
    geometry, size = layout.geometry, layout.tp_size

    def share(width: int, of: int) -> int:
        return -(-of // size) * (width // of)

    widths = geometry.module_shape(module)
    heads = {"q_proj": geometry.heads, "k_proj": geometry.kv_heads, "v_proj": geometry.kv_heads}
    if module not in ROW_PARALLEL:
        return widths[0], share(widths[1], heads.get(module, widths[1]))
    inner = share(widths[0], geometry.heads if module == "o_proj" else widths[0])
    split_out = layout.tp_strategy is TpStrategy.SLORA
    return inner, share(widths[1], widths[1]) if split_out else widths[1]


def row_tiles(owner_T: Sequence[int], device: torch.device, tile_rows: int = 8) -> RowTiles:
    """The reference's tiles of runs of equal owners; -1 owns nothing."""
    owner = np.asarray(owner_T)
    start = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    length = np.diff(np.r_[start, len(owner)])
    kept = owner[start] >= 0
    tiles = cut_tiles(
        owner[start][kept],
        start[kept],
        length[kept],
        tile_rows=tile_rows,
        num_rows=len(owner),
    )
    return RowTiles(*(tensor.to(device) for tensor in tiles))


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences in scattered pages; the last `new` tokens of each are rows of the step."""

    pool: PoolView
    block_table_SP: torch.Tensor
    sequence_T: torch.Tensor
    position_T: torch.Tensor

    def tiles(self) -> RowTiles:
        return row_tiles(self.sequence_T.tolist(), self.sequence_T.device)


def store_sequences(
    lengths: Sequence[tuple[int, int]],
    layout: PageLayout,
    device: torch.device,
    padding: int = 0,
    seed: int = 0,
) -> Sequences:
    """Sequences of (tokens, new tokens), followed by `padding` rows of no sequence."""
    generator = np.random.default_rng(seed)
    num_pages = [-(-tokens // PAGE_TOKENS) for tokens, _ in lengths]
    pool = poisoned_pool(sum(num_pages) + 3, layout, device)
    kv = pool.slices.view(-1, LAYERS, *pool.kv_shape)
    shuffled = generator.permutation(np.arange(1, 1 + sum(num_pages)))
    table = np.zeros((len(lengths), max(num_pages) + 2), np.int32)
    torch.manual_seed(seed)
    for line, pages, (tokens, _) in zip(
        table, np.split(shuffled, np.cumsum(num_pages)[:-1]), lengths, strict=True
    ):
        line[: len(pages)] = pages
        for index, page in enumerate(pages):
            cached = min(PAGE_TOKENS, tokens - index * PAGE_TOKENS)
            values = kv[int(page), :, :, :, :cached]
            values.copy_(torch.randn(values.shape))
    sequence = [s for s, (_, new) in enumerate(lengths) for _ in range(new)] + [-1] * padding
    position = [p for tokens, new in lengths for p in range(tokens - new, tokens)] + [0] * padding
    return Sequences(
        pool,
        torch.from_numpy(table).to(device),
        torch.tensor(sequence, dtype=torch.int32, device=device),
        torch.tensor(position, dtype=torch.int32, device=device),
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``|actual - expected| / |expected|``; NaN never passes a comparison with it."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def precise_pool(pool: PoolView) -> PoolView:
    """The same values in float32, for a reference that computes in it."""
    layout = pool.layout
    precise = PageLayout(
        geometry=layout.geometry,
        dtype=Dtype.FP32,
        tp_size=layout.tp_size,
        tp_strategy=layout.tp_strategy,
    )
    return PoolView(pool.slices.float(), precise)
