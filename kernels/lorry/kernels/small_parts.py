"""How the rows of a small step are cut into parts, one for each program and KV head.

Each row is cut into parts of equally many blocks of tokens; a row with more tokens has more parts.
How follows from the positions, so every program finds its part by itself, and there is no plan.

The parts of a row and KV head are merged by the last program that is done with one.

Shape suffixes: T = rows of the step, K = KV heads.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from lorry.kernels.attention_block import NOTHING_SEEN, merge_parts
from lorry.kernels.attention_plan import first_block_of
from lorry.kernels.dependent_launch import load_early
from lorry.kernels.device import multiprocessors


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallSetting:
    """Launch setting; `block_rows` counts query heads of a KV head."""

    block_rows: int
    block_tokens: int
    programs_per_multiprocessor: int
    merged_parts: int  # at a time
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class SmallWork:
    """Device memory of what programs sum; for one launch at a time."""

    setting: SmallSetting
    kv_heads: int
    window: int | None  # how many positions a row attends to, its own included; None is all
    max_rows: int
    partial_o: torch.Tensor  # float32, [KV heads, parts, heads of one, head dim]
    partial_ml: torch.Tensor  # float32, [KV heads, parts, 2, heads of one]: maximum and sum
    arrived_TK: torch.Tensor  # int32, zero between launches

    @property
    def num_parts(self) -> int:
        """Of all rows together, for each KV head."""
        return self.partial_o.shape[1]

    @property
    def group(self) -> int:
        return self.partial_o.shape[2]


def allocate_small_work(
    setting: SmallSetting,
    *,
    max_rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    window: int | None = None,
) -> SmallWork:
    """Memory for steps of up to `max_rows` rows."""
    group = heads // kv_heads
    if setting.block_rows < group:
        raise ValueError(f"block_rows {setting.block_rows} is below the {group} heads of a group")
    programs = multiprocessors(device) * setting.programs_per_multiprocessor
    parts = max(programs // kv_heads, max_rows)
    empty = partial(torch.empty, dtype=torch.float32, device=device)
    return SmallWork(
        setting=setting,
        kv_heads=kv_heads,
        window=window,
        max_rows=max_rows,
        partial_o=empty(kv_heads, parts, group, head_dim),
        partial_ml=empty(kv_heads, parts, 2, group),
        arrived_TK=torch.zeros(max_rows, kv_heads, dtype=torch.int32, device=device),
    )


@triton.jit
def part_of(
    sequence_ptr,
    position_ptr,
    num_rows,
    place,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Row and part of the program at `place`; the row's sequence, position, blocks and parts.

    A row has one part, and of the parts that are left over as large a share as of all blocks. A
    place that is nobody's is told by 0 blocks.
    """
    t = tl.arange(0, ROWS)
    sequence_T = load_early(sequence_ptr + t, t < num_rows, -1)
    position_T = load_early(position_ptr + t, t < num_rows, 0)
    blocks_T = position_T // BLOCK_TOKENS + 1
    if WINDOW:
        blocks_T -= first_block_of(position_T, WINDOW, BLOCK_TOKENS)
    blocks_T = tl.where(sequence_T >= 0, blocks_T, 0)
    all_blocks = tl.maximum(tl.sum(blocks_T, 0), 1)
    parts_T = tl.where(blocks_T > 0, 1 + (PARTS - ROWS) * blocks_T // all_blocks, 0)
    end_T = tl.cumsum(parts_T, 0)
    row = tl.sum((end_T <= place).to(tl.int32), 0)
    is_own = t == row
    parts = tl.sum(tl.where(is_own, parts_T, 0), 0)
    return (
        row.to(tl.int64),
        place - tl.sum(tl.where(is_own, end_T - parts_T, 0), 0),
        tl.sum(tl.where(is_own, sequence_T, 0), 0),
        tl.sum(tl.where(is_own, position_T, 0), 0),
        tl.sum(tl.where(is_own, blocks_T, 0), 0),
        tl.maximum(parts, 1),
    )


@triton.jit
def store_part(
    partial_o_ptr,
    partial_ml_ptr,
    slot,
    m,
    total,
    acc,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Keep what one program has summed."""
    head = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, HEAD_DIM)
    o_ptrs = partial_o_ptr + (slot * GROUP + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(o_ptrs, acc, mask=(head < GROUP)[:, None])
    ml_ptrs = partial_ml_ptr + 2 * slot * GROUP + head
    tl.store(ml_ptrs, m, mask=head < GROUP)
    tl.store(ml_ptrs + GROUP, total, mask=head < GROUP)


@triton.jit
def is_last(arrived_ptr, parts):
    """Count a part; whether all are there now, which ends the count."""
    tl.debug_barrier()  # all threads' partials precede the arrival
    is_last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == parts - 1
    if is_last:
        tl.store(arrived_ptr, 0)
    return is_last


@triton.jit
def merge_row(
    partial_o_ptr,
    partial_ml_ptr,
    out_ptr,
    stride_oh,
    first_slot,
    parts,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    MERGED_PARTS: tl.constexpr,
):
    """Write the sum of a row's parts, which lie one after the other."""
    head = tl.arange(0, GROUP_BLOCK)
    d = tl.arange(0, HEAD_DIM)
    m = tl.full((GROUP_BLOCK,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    acc = tl.zeros((GROUP_BLOCK, HEAD_DIM), tl.float32)
    for begin in tl.range(0, parts, MERGED_PARTS, num_stages=1):
        part = begin + tl.arange(0, MERGED_PARTS)
        is_part = (head < GROUP)[:, None] & (part < parts)[None, :]
        slot = (first_slot + part)[None, :]
        ml_ptrs = partial_ml_ptr + 2 * slot * GROUP + head[:, None]
        part_m = tl.load(ml_ptrs, mask=is_part, other=NOTHING_SEEN)
        part_total = tl.load(ml_ptrs + GROUP, mask=is_part, other=1.0)
        o_ptrs = partial_o_ptr + (slot * GROUP + head[:, None])[:, :, None] * HEAD_DIM + d
        part_o = tl.load(o_ptrs, mask=is_part[:, :, None], other=0.0)
        m, total, acc = merge_parts(m, total, acc, part_m, part_total, part_o)
    out_ptrs = out_ptr + (head * stride_oh)[:, None] + d[None, :]
    o = acc / total[:, None]
    tl.store(out_ptrs, o.to(out_ptr.dtype.element_ty), mask=(head < GROUP)[:, None])
