"""Attention over KV pages for steps of few rows: one kernel, which needs no plan.

The last program of a row and KV head to finish merges what all of them have summed.

Shape suffixes: T = rows of the step, Q = query heads, K = KV heads, D = head dimension,
S = sequences, P = pages of a sequence.
"""

import math

import torch
import triton
import triton.language as tl

from lorry.kernels.attention_block import NOTHING_SEEN, attend_block
from lorry.kernels.attention_plan import first_block_of
from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.paged_attention import LOG2_E
from lorry.kernels.pool_view import PoolView
from lorry.kernels.small_parts import SmallWork, is_last, merge_row, part_of, store_part


@triton.jit
def _small_kernel(
    q_ptr,  # [T, Q, D]
    pool_ptr,  # [pages, K or V, K, page tokens, D] of one layer
    block_table_ptr,  # [S, P]
    sequence_ptr,  # [T]
    position_ptr,  # [T]
    out_ptr,  # [T, Q, D]
    partial_o_ptr,
    partial_ml_ptr,
    arrived_ptr,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_bt,
    page_stride,
    scale_log2,
    num_rows,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 is none
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    MERGED_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program reads one part of one row's tokens, for one KV head."""
    kv_head = tl.program_id(0)
    place = tl.program_id(1)
    row, part, sequence, position, blocks, parts = part_of(
        sequence_ptr, position_ptr, num_rows, place, ROWS, PARTS, WINDOW, BLOCK_TOKENS
    )
    wait_for_kernels_before()
    part_blocks = (blocks + parts - 1) // parts
    begin = part * part_blocks
    if begin < blocks:
        head = tl.arange(0, BLOCK_ROWS)
        d = tl.arange(0, HEAD_DIM)
        is_head = (head < GROUP)[:, None]
        q_ptr += row * stride_qt + kv_head * GROUP * stride_qh
        q_ptrs = q_ptr + (head * stride_qh)[:, None] + d[None, :]
        m, total, acc = _attend(
            tl.load(q_ptrs, mask=is_head, other=0.0),
            pool_ptr + kv_head * (PAGE_TOKENS * HEAD_DIM),
            block_table_ptr + sequence.to(tl.int64) * stride_bt,
            position,
            begin,
            tl.minimum(begin + part_blocks, blocks),
            page_stride,
            scale_log2,
            KV_HEADS,
            HEAD_DIM,
            PAGE_TOKENS,
            WINDOW,
            BLOCK_ROWS,
            BLOCK_TOKENS,
            PRECISION,
        )
        out_ptr += row * stride_ot + kv_head * GROUP * stride_oh
        if part_blocks >= blocks:
            out_ptrs = out_ptr + (head * stride_oh)[:, None] + d[None, :]
            o = acc / total[:, None]
            tl.store(out_ptrs, o.to(out_ptr.dtype.element_ty), mask=is_head)
        else:
            slot = kv_head * PARTS + place
            store_part(
                partial_o_ptr, partial_ml_ptr, slot, m, total, acc, GROUP, HEAD_DIM, BLOCK_ROWS
            )
            read_parts = (blocks + part_blocks - 1) // part_blocks
            if is_last(arrived_ptr + row * KV_HEADS + kv_head, read_parts):
                merge_row(
                    partial_o_ptr,
                    partial_ml_ptr,
                    out_ptr,
                    stride_oh,
                    slot - part,
                    read_parts,
                    GROUP,
                    HEAD_DIM,
                    GROUP_BLOCK,
                    MERGED_PARTS,
                )


@triton.jit
def _attend(
    q,
    pool_ptr,
    block_table_ptr,
    position,
    begin,
    end,
    page_stride,
    scale_log2,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum, sum and weighted values of the scores of the row's blocks `begin` to `end`."""
    first_block = 0
    if WINDOW:
        first_block = first_block_of(position, WINDOW, BLOCK_TOKENS)
    position_H = tl.full((BLOCK_ROWS,), 0, tl.int32) + position
    m = tl.full((BLOCK_ROWS,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    for block in range(first_block + begin, first_block + end):
        m, total, acc = attend_block(
            q,
            m,
            total,
            acc,
            block,
            pool_ptr,
            block_table_ptr,
            position_H,
            position + 1,
            page_stride,
            scale_log2,
            KV_HEADS,
            HEAD_DIM,
            PAGE_TOKENS,
            WINDOW,
            BLOCK_TOKENS,
            PRECISION,
        )
    return m, total, acc


def small_attention(
    q_TQD: torch.Tensor,
    pool: PoolView,
    layer: int,
    block_table_SP: torch.Tensor,
    sequence_T: torch.Tensor,
    position_T: torch.Tensor,
    work: SmallWork,
    out_TQD: torch.Tensor,
) -> None:
    """Write ``softmax(q k / sqrt(D)) v`` of the rows into `out_TQD`.

    The reference is `paged_attention_reference`. Rows of no sequence, which is -1, are left as they
    are. The kernel before this one may not write `sequence_T` and `position_T`, which are read
    early. The unit strides of q, out and the block table are required.
    """
    layout, setting = pool.layout, work.setting
    num_rows, _, head_dim = q_TQD.shape
    if num_rows > work.max_rows:
        raise ValueError(f"{num_rows} rows exceed the {work.max_rows} of the work")
    _small_kernel[(work.kv_heads, work.num_parts)](
        q_TQD,
        pool.slices[layer:],
        block_table_SP,
        sequence_T,
        position_T,
        out_TQD,
        work.partial_o,
        work.partial_ml,
        work.arrived_TK,
        q_TQD.stride(0),
        q_TQD.stride(1),
        out_TQD.stride(0),
        out_TQD.stride(1),
        block_table_SP.stride(0),
        pool.layers * layout.slice_elements,
        LOG2_E / math.sqrt(head_dim),
        num_rows,
        ROWS=triton.next_power_of_2(num_rows),
        PARTS=work.num_parts,
        KV_HEADS=work.kv_heads,
        GROUP=work.group,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=layout.page_tokens,
        WINDOW=work.window or 0,
        BLOCK_ROWS=setting.block_rows,
        BLOCK_TOKENS=setting.block_tokens,
        GROUP_BLOCK=triton.next_power_of_2(work.group),
        MERGED_PARTS=setting.merged_parts,
        PRECISION="ieee" if q_TQD.dtype == torch.float32 else "tf32",
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
        launch_pdl=has_dependent_launch(q_TQD.device),
    )
