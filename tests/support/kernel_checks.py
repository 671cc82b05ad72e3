"""Run a kernel and its reference on one case and compare; for the interpreter and for a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from lorry.kernels.attention_plan import AttentionSetting, allocate_attention_work, plan_attention
from lorry.kernels.invariant_attention import split_attention
from lorry.kernels.lora import AdapterTables, lora_reference
from lorry.kernels.lora_expand import lora_expand_add
from lorry.kernels.lora_plan import LoraSetting, LoraWork, allocate_lora_work, plan_lora
from lorry.kernels.lora_shrink import lora_shrink
from lorry.kernels.page_layout import GROUPS, PageLayout
from lorry.kernels.paged_attention import paged_attention, paged_attention_reference
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.kernels.rope import QkNorm, cos_sin_table, rope_write_kv, rope_write_kv_reference
from lorry.kernels.small_attention import small_attention
from lorry.kernels.small_parts import SmallSetting, allocate_small_work
from lorry.kernels.split_plan import (
    SplitSetting,
    allocate_partials,
    allocate_split_work,
    plan_splits,
)
from tests.support.kernel_cases import (
    LAYER,
    TOLERANCE,
    Sequences,
    poisoned_pool,
    precise_pool,
    relative_error,
    row_tiles,
    widths_of,
)


def attend(
    sequences: Sequences,
    q_TQD: torch.Tensor,
    setting: AttentionSetting,
    window: int | None = None,
) -> torch.Tensor:
    """The kernel's output, NaN where it writes nothing."""
    layout = sequences.pool.layout
    _, heads, head_dim = q_TQD.shape
    work = allocate_attention_work(
        setting,
        max_rows=q_TQD.shape[0] + 5,
        heads=heads,
        kv_heads=layout.local_kv_heads,
        head_dim=head_dim,
        device=q_TQD.device,
        window=window,
    )
    work.partial_o.fill_(torch.nan)
    work.partial_ml.fill_(torch.nan)
    plan_attention(sequences.sequence_T, sequences.position_T, work)
    out_TQD = torch.full_like(q_TQD, torch.nan)  # another kernel than the plan's stands before
    paged_attention(q_TQD, sequences.pool, LAYER, sequences.block_table_SP, work, out_TQD)
    assert not work.arrived_P.any(), "the next launch would merge too early"
    return out_TQD


def attend_small(
    sequences: Sequences, q_TQD: torch.Tensor, setting: SmallSetting, window: int | None = None
) -> torch.Tensor:
    """The small steps' kernel's output, NaN where it writes nothing."""
    rows, heads, head_dim = q_TQD.shape
    work = allocate_small_work(
        setting,
        max_rows=rows,
        heads=heads,
        kv_heads=sequences.pool.layout.local_kv_heads,
        head_dim=head_dim,
        device=q_TQD.device,
        window=window,
    )
    work.partial_o.fill_(torch.nan)
    work.partial_ml.fill_(torch.nan)
    out_TQD = torch.full_like(q_TQD, torch.nan)
    step = (sequences.sequence_T, sequences.position_T)
    small_attention(q_TQD, sequences.pool, LAYER, sequences.block_table_SP, *step, work, out_TQD)
    assert not work.arrived_TK.any(), "the next launch would merge too early"
    return out_TQD


def attend_splits(
    sequences: Sequences, q_TQD: torch.Tensor, setting: SplitSetting, window: int | None = None
) -> torch.Tensor:
    """The batch-invariant kernel's output, NaN where it writes nothing."""
    rows, heads, head_dim = q_TQD.shape
    partials = allocate_partials(
        setting, max_rows=rows + 5, heads=heads, head_dim=head_dim, device=q_TQD.device
    )
    partials.o_TQWD.fill_(torch.nan)
    partials.ml_TQW2.fill_(torch.nan)
    kv_heads = sequences.pool.layout.local_kv_heads
    work = allocate_split_work(setting, partials, kv_heads=kv_heads, window=window)
    out_TQD = torch.full_like(q_TQD, torch.nan)
    step = (sequences.sequence_T, sequences.position_T)
    plan_splits(*step, work)
    split_attention(q_TQD, sequences.pool, LAYER, sequences.block_table_SP, *step, work, out_TQD)
    return out_TQD


def rows_of(sequences: Sequences, rows: slice) -> Sequences:
    """A step of some of the rows."""
    return replace(
        sequences,
        sequence_T=sequences.sequence_T[rows],
        position_T=sequences.position_T[rows],
    )


def check_attention(
    sequences: Sequences,
    heads: int,
    setting: AttentionSetting | SmallSetting | SplitSetting,
    window: int | None = None,
) -> None:
    attention: Callable[[torch.Tensor], torch.Tensor]
    if isinstance(setting, SplitSetting):
        attention = partial(attend_splits, sequences, setting=setting, window=window)
    elif isinstance(setting, SmallSetting):
        attention = partial(attend_small, sequences, setting=setting, window=window)
    else:
        attention = partial(attend, sequences, setting=setting, window=window)
    pool = sequences.pool
    rows = sequences.sequence_T.shape[0]
    q_TQD = torch.randn(rows, heads, pool.layout.geometry.head_dim).to(pool.slices)
    out_TQD = attention(q_TQD)
    expected = paged_attention_reference(
        q_TQD.float(),
        precise_pool(pool),
        LAYER,
        sequences.position_T.long(),
        sequences.block_table_SP.long(),
        sequences.tiles(),
        window,
    )
    is_row = sequences.sequence_T >= 0
    assert relative_error(out_TQD[is_row], expected[is_row]) < TOLERANCE[pool.slices.dtype]
    assert out_TQD[~is_row].isnan().all(), "padded rows are written"


def check_rotation(
    layout: PageLayout, device: torch.device, *, rows: int, has_norm: bool = False
) -> None:
    """Rotated queries, and that a pool's pages get the rows' keys and values and nothing else."""
    torch.manual_seed(0)
    shape, dtype = layout.geometry, TORCH_DTYPES[layout.dtype]
    tp_heads = -(-shape.heads // layout.tp_size)
    kv_heads, positions = layout.local_kv_heads, 5000
    qkv = torch.randn(rows, tp_heads + 2 * kv_heads, shape.head_dim).to(device, dtype)
    q, k, v = qkv.split([tp_heads, kv_heads, kv_heads], dim=1)
    q_D, k_D = (torch.randn(2, shape.head_dim) + 1).to(device, dtype)
    norm = QkNorm(q_D, k_D, 1e-6) if has_norm else None
    table = cos_sin_table(positions, shape.head_dim, 5e5).to(device)
    position = torch.randint(0, positions, (rows,)).to(device)
    page = torch.randperm(rows + 29)[:rows].to(device)
    actual, expected = (poisoned_pool(rows + 30, layout, device) for _ in range(2))
    step = (table, position, page)
    rotated = rope_write_kv_reference(q, k, v, *step, expected, LAYER, norm)
    rope_write_kv(q, k, v, *step, actual, LAYER, norm)
    assert relative_error(q, rotated) < TOLERANCE[dtype]
    written = ~expected.slices.isnan()
    assert torch.equal(~actual.slices.isnan(), written)
    assert relative_error(actual.slices[written], expected.slices[written]) < TOLERANCE[dtype]


def adapt(
    x_TI: torch.Tensor,
    base: torch.Tensor,
    group: int,
    pool: PoolView,
    tables: AdapterTables,
    work: LoraWork,
) -> torch.Tensor:
    """A group's outputs, side by side, with the adapters that `work` was planned for."""
    out = base.clone()
    outputs = out.split([widths_of(pool.layout, module)[1] for module in GROUPS[group]], dim=1)
    work.y.fill_(torch.nan)
    y_STY = lora_shrink(x_TI, group, pool, tables, LAYER, work)
    lora_expand_add(outputs, group, pool, tables, LAYER, work, y_STY)
    return out


def check_lora(
    slots: Sequence[int],
    pool: PoolView,
    tables: AdapterTables,
    setting: LoraSetting,
    groups: Sequence[int] = range(len(GROUPS)),
    seed: int = 0,
) -> None:
    layout, device, dtype = pool.layout, pool.slices.device, pool.slices.dtype
    torch.manual_seed(seed)
    work = allocate_lora_work(setting, layout, max_rows=len(slots) + 3, device=device)
    slot_T = torch.tensor(slots, dtype=torch.int32, device=device)
    plan_lora(slot_T, tables, work)
    is_base = slot_T < 0
    for group in groups:
        modules = GROUPS[group]
        x_TI = torch.randn(len(slots), widths_of(layout, modules[0])[0]).to(pool.slices)
        x_TI[is_base] = torch.nan
        widths = [widths_of(layout, module)[1] for module in modules]
        base = torch.randn(len(slots), sum(widths)).to(pool.slices)
        outputs = adapt(x_TI, base, group, pool, tables, work).split(widths, dim=1)
        expected = base.float().clone().split(widths, dim=1)
        tiles = row_tiles(slots, device)
        lora_reference(x_TI.float(), expected, modules, precise_pool(pool), tables, LAYER, tiles)
        for output, wanted, kept in zip(outputs, expected, base.split(widths, dim=1), strict=True):
            assert relative_error(output, wanted) < TOLERANCE[dtype], modules
            assert torch.equal(output[is_base], kept[is_base]), "base rows are written"
