"""Paged attention, batch-invariant: a row's result depends on its own sequence alone.

How a row is summed is planned by `split_plan`. In a tile of several rows each row skips what it
does not see by adding zeros, which changes no bit.

Shape suffixes: T = rows of the step, N = tiles, Q = query heads, W = ways, D = head dimension.
"""

import math

import torch
import triton
import triton.language as tl

from lorry.kernels.attention_block import NOTHING_SEEN, attend_block, merge_part
from lorry.kernels.attention_plan import first_block_of
from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.device import multiprocessors
from lorry.kernels.paged_attention import LOG2_E
from lorry.kernels.pool_view import PoolView
from lorry.kernels.split_plan import TILE_FIELDS, SplitWork, ways_of

MERGED_HEADS = 8  # of a row, by one program


@triton.jit
def _blocks_below(block, way, SPLIT_BLOCKS: tl.constexpr, WAYS: tl.constexpr):
    """How many blocks of a way come before `block`."""
    split = block // SPLIT_BLOCKS
    whole = (split - way + WAYS - 1) // WAYS * SPLIT_BLOCKS  # of 0 or more: split + WAYS > way
    return whole + tl.where(split % WAYS == way, block % SPLIT_BLOCKS, 0)


@triton.jit
def _split_kernel(
    q_ptr,  # [T, Q, D]
    pool_ptr,  # [pages, K or V, K, page tokens, D] of one layer
    block_table_ptr,  # [S, P]
    tile_ptr,  # [N, 4]
    count_ptr,  # [2]
    partial_o_ptr,  # [T, Q, W, D]
    partial_ml_ptr,  # [T, Q, W, 2]
    stride_qt,
    stride_qh,
    stride_bt,
    page_stride,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 is none
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    WAYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks units: a tile, a KV head and a way."""
    wait_for_kernels_before()
    num_tiles = tl.load(count_ptr)
    num_units = num_tiles * KV_HEADS * tl.load(count_ptr + 1)
    pair = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, HEAD_DIM)
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        of_heads = unit // KV_HEADS
        kv_head = unit - of_heads * KV_HEADS
        way = of_heads // num_tiles
        fields = tile_ptr + (of_heads - way * num_tiles) * TILE_FIELDS
        rows = tl.load(fields + 1)
        position = tl.load(fields + 3)
        num_tokens = position + rows
        if way < ways_of(num_tokens, BLOCK_TOKENS, SPLIT_BLOCKS, WAYS):
            row = tl.load(fields).to(tl.int64) + pair // GROUP
            head = kv_head * GROUP + pair % GROUP
            is_row = (pair // GROUP < rows)[:, None]
            q_offset = (row * stride_qt + head * stride_qh)[:, None] + d[None, :]
            q = tl.load(q_ptr + q_offset, mask=is_row, other=0.0)
            position_pair = tl.minimum(position + pair // GROUP, num_tokens - 1)
            block_table = block_table_ptr + tl.load(fields + 2).to(tl.int64) * stride_bt

            m = tl.full((BLOCK_ROWS,), NOTHING_SEEN, tl.float32)
            total = tl.zeros((BLOCK_ROWS,), tl.float32)
            acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
            first = 0
            if WINDOW:
                first_block = first_block_of(position, WINDOW, BLOCK_TOKENS)
                first = _blocks_below(first_block, way, SPLIT_BLOCKS, WAYS)
            end_block = (num_tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
            for place in range(first, _blocks_below(end_block, way, SPLIT_BLOCKS, WAYS)):
                turn = place // SPLIT_BLOCKS  # in which the other ways had a split, too
                m, total, acc = attend_block(
                    q,
                    m,
                    total,
                    acc,
                    place + (turn * (WAYS - 1) + way) * SPLIT_BLOCKS,
                    pool_ptr + kv_head * (PAGE_TOKENS * HEAD_DIM),
                    block_table,
                    position_pair,
                    num_tokens,
                    page_stride,
                    scale_log2,
                    KV_HEADS,
                    HEAD_DIM,
                    PAGE_TOKENS,
                    WINDOW,
                    BLOCK_TOKENS,
                    PRECISION,
                )

            slot = (row * (KV_HEADS * GROUP) + head) * WAYS + way
            tl.store(partial_o_ptr + slot[:, None] * HEAD_DIM + d[None, :], acc, mask=is_row)
            tl.store(partial_ml_ptr + slot * 2, m, mask=pair // GROUP < rows)
            tl.store(partial_ml_ptr + slot * 2 + 1, total, mask=pair // GROUP < rows)


@triton.jit
def _merge_kernel(
    partial_o_ptr,  # [T, Q, W, D]
    partial_ml_ptr,  # [T, Q, W, 2]
    sequence_ptr,  # [T]
    position_ptr,  # [T]
    out_ptr,  # [T, Q, D]
    stride_ot,
    stride_oh,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    WAYS: tl.constexpr,
):
    """One program for each row and block of heads."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    if tl.load(sequence_ptr + row) >= 0:
        head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        d = tl.arange(0, HEAD_DIM)
        is_head = head < HEADS
        m = tl.full((BLOCK_HEADS,), NOTHING_SEEN, tl.float32)
        total = tl.zeros((BLOCK_HEADS,), tl.float32)
        acc = tl.zeros((BLOCK_HEADS, HEAD_DIM), tl.float32)
        num_tokens = tl.load(position_ptr + row) + 1
        for way in range(0, ways_of(num_tokens, BLOCK_TOKENS, SPLIT_BLOCKS, WAYS)):
            slot = (row * HEADS + head) * WAYS + way
            part_m = tl.load(partial_ml_ptr + slot * 2, mask=is_head, other=0.0)
            part_total = tl.load(partial_ml_ptr + slot * 2 + 1, mask=is_head, other=1.0)
            o_ptrs = partial_o_ptr + slot[:, None] * HEAD_DIM + d[None, :]
            part_o = tl.load(o_ptrs, mask=is_head[:, None], other=0.0)
            m, total, acc = merge_part(m, total, acc, part_m, part_total, part_o)

        out_ptrs = out_ptr + row * stride_ot + head[:, None] * stride_oh + d[None, :]
        out = acc / total[:, None]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_head[:, None])


def split_attention(
    q_TQD: torch.Tensor,
    pool: PoolView,
    layer: int,
    block_table_SP: torch.Tensor,
    sequence_T: torch.Tensor,
    position_T: torch.Tensor,
    work: SplitWork,
    out_TQD: torch.Tensor,
) -> None:
    """Write ``softmax(q k / sqrt(D)) v`` of the rows that `work` was planned for into `out_TQD`.

    The reference is `paged_attention_reference`. Rows of no sequence are left as they are. The unit
    strides of q, out and the block table are required.
    """
    layout, setting, partials = pool.layout, work.setting, work.partials
    num_rows, heads, head_dim = q_TQD.shape
    programs = multiprocessors(q_TQD.device) * setting.programs_per_multiprocessor
    _split_kernel[(programs,)](
        q_TQD,
        pool.slices[layer:],
        block_table_SP,
        work.tile_N4,
        work.count_2,
        partials.o_TQWD,
        partials.ml_TQW2,
        q_TQD.stride(0),
        q_TQD.stride(1),
        block_table_SP.stride(0),
        pool.layers * layout.slice_elements,
        LOG2_E / math.sqrt(head_dim),
        KV_HEADS=work.kv_heads,
        GROUP=work.group,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=layout.page_tokens,
        WINDOW=work.window or 0,
        BLOCK_ROWS=setting.block_rows,
        BLOCK_TOKENS=setting.block_tokens,
        SPLIT_BLOCKS=setting.split_blocks,
        WAYS=setting.ways,
        PRECISION="ieee" if q_TQD.dtype == torch.float32 else "tf32",
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
        launch_pdl=has_dependent_launch(q_TQD.device),
    )
    _merge_kernel[(num_rows, triton.cdiv(heads, MERGED_HEADS))](
        partials.o_TQWD,
        partials.ml_TQW2,
        sequence_T,
        position_T,
        out_TQD,
        out_TQD.stride(0),
        out_TQD.stride(1),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=MERGED_HEADS,
        BLOCK_TOKENS=setting.block_tokens,
        SPLIT_BLOCKS=setting.split_blocks,
        WAYS=setting.ways,
        num_warps=2,
        launch_pdl=has_dependent_launch(q_TQD.device),
    )
