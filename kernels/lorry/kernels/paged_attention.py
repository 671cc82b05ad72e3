"""Causal attention of a step's rows over the KV pages of their sequences.

Shape suffixes: T = rows of the step, Q = query heads, K = KV heads, D = head dimension,
G = query heads of a KV head, S = sequences, P = pages of a sequence, N = tiles, M = rows of a tile,
C = cached tokens.
"""

import math

import torch
import triton
import triton.language as tl

from lorry.kernels.attention_plan import PROGRAM_FIELDS, TILE_FIELDS, AttentionWork
from lorry.kernels.pool_view import PoolView
from lorry.kernels.tiles import RowTiles, gather_rows, scatter_rows

LOG2_E = 1.4426950408889634
NOTHING_SEEN = tl.constexpr(-1e30)  # a finite maximum: the difference of two infinities is NaN


def paged_attention_reference(
    q_TQD: torch.Tensor,
    pool: PoolView,
    layer: int,
    position_T: torch.Tensor,
    block_table_SP: torch.Tensor,
    tiles: RowTiles,
) -> torch.Tensor:
    """Return ``softmax(q k / sqrt(D)) v`` over tokens 0 to ``position_T[t]`` of row t's sequence.

    Every row stands in one tile; a tile's owner is its sequence, a row of `block_table_SP`.
    """
    k_NKCD, v_NKCD = _cached(pool, layer, block_table_SP[tiles.owner_N])
    position_NM = gather_rows(position_T, tiles.row_NM)
    cached_C = torch.arange(k_NKCD.shape[2], device=q_TQD.device)
    visible_NMC = cached_C <= position_NM[..., None]
    unread_NC = ~visible_NMC.any(dim=1)
    # Stale bytes of a page may be anything: 0 * NaN would carry them into the sum.
    v_NKCD = v_NKCD.masked_fill(unread_NC[:, None, :, None], 0)
    q_NKGMD = _grouped_by_kv_head(gather_rows(q_TQD, tiles.row_NM), k_NKCD.shape[1])
    score = (q_NKGMD @ k_NKCD[:, :, None].transpose(-1, -2)).float() / math.sqrt(q_TQD.shape[-1])
    score = score.masked_fill(~visible_NMC[:, None, None], -torch.inf)
    o_NKGMD = score.softmax(dim=-1).to(v_NKCD.dtype) @ v_NKCD[:, :, None]
    o_TQD = torch.empty_like(q_TQD)
    scatter_rows(o_TQD, tiles.row_NM, o_NKGMD.permute(0, 3, 1, 2, 4).flatten(2, 3))
    return o_TQD


def _cached(
    pool: PoolView, layer: int, table_NP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each tile's sequence, ``[N, K, C, D]``."""
    num_tiles, num_pages = table_NP.shape
    slices = pool.slices.index_select(0, (table_NP * pool.layers + layer).flatten())
    kv = slices.view(num_tiles, num_pages, *pool.kv_shape).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
    return kv[0], kv[1]


def _grouped_by_kv_head(q_NMQD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    tiles, rows, heads, dim = q_NMQD.shape
    return q_NMQD.view(tiles, rows, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)


@triton.jit
def _attention_kernel(
    q_ptr,  # [T, Q, D]
    pool_ptr,  # [pages, K or V, K, page tokens, D] of one layer
    block_table_ptr,  # [S, P]
    out_ptr,  # [T, Q, D]
    tile_ptr,
    program_ptr,
    share_ptr,
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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    UNIT_COST: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks its share of the costs, unit by unit."""
    program = tl.program_id(0)
    tile = tl.load(program_ptr + program * PROGRAM_FIELDS)
    kv_head = tl.load(program_ptr + program * PROGRAM_FIELDS + 1)
    start = tl.load(program_ptr + program * PROGRAM_FIELDS + 2)
    left = tl.load(program_ptr + program * PROGRAM_FIELDS + 3)
    share = tl.load(share_ptr)
    slot = 2 * program  # of a partial result: only the first and the last unit can be cut

    pair = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, HEAD_DIM)
    while left > 0:
        first_row = tl.load(tile_ptr + tile * TILE_FIELDS)
        rows = tl.load(tile_ptr + tile * TILE_FIELDS + 1)
        sequence = tl.load(tile_ptr + tile * TILE_FIELDS + 2)
        position = tl.load(tile_ptr + tile * TILE_FIELDS + 3)
        cost_before = tl.load(tile_ptr + tile * TILE_FIELDS + 4)
        unit_blocks = tl.load(tile_ptr + tile * TILE_FIELDS + 5)
        stop = tl.minimum(unit_blocks + UNIT_COST, start + left)
        first_block = tl.maximum(start - UNIT_COST, 0)
        count = stop - UNIT_COST - first_block
        if count > 0:
            row = first_row.to(tl.int64) + pair // GROUP
            head = kv_head * GROUP + pair % GROUP
            is_row = (pair // GROUP < rows)[:, None]
            q = tl.load(
                q_ptr + (row * stride_qt + head * stride_qh)[:, None] + d[None, :],
                mask=is_row,
                other=0.0,
            )
            m, total, acc = _attend(
                q,
                pool_ptr + kv_head * (PAGE_TOKENS * HEAD_DIM),
                block_table_ptr + sequence.to(tl.int64) * stride_bt,
                position + pair // GROUP,
                position + rows,
                first_block,
                first_block + count,
                page_stride,
                scale_log2,
                KV_HEADS,
                HEAD_DIM,
                PAGE_TOKENS,
                BLOCK_ROWS,
                BLOCK_TOKENS,
                PRECISION,
            )

            is_whole = count == unit_blocks
            if not is_whole:
                o_offset = (slot * BLOCK_ROWS + pair)[:, None] * HEAD_DIM + d[None, :]
                tl.store(partial_o_ptr + o_offset, acc, mask=is_row)
                tl.store(partial_ml_ptr + 2 * slot * BLOCK_ROWS + pair, m)
                tl.store(partial_ml_ptr + (2 * slot + 1) * BLOCK_ROWS + pair, total)
                unit_start = cost_before + kv_head * (unit_blocks + UNIT_COST)
                first = (unit_start + UNIT_COST) // share
                last = (unit_start + UNIT_COST + unit_blocks - 1) // share
                tl.debug_barrier()  # all threads' partials precede the arrival
                arrived = tl.atomic_add(arrived_ptr + first, 1, sem="acq_rel")
                is_whole = arrived == last - first
                if is_whole:
                    tl.store(arrived_ptr + first, 0)
                    total, acc = _merge(
                        partial_o_ptr,
                        partial_ml_ptr,
                        is_row,
                        first,
                        last,
                        (first * share < unit_start).to(tl.int32),
                        HEAD_DIM,
                        BLOCK_ROWS,
                        MERGE_STAGES,
                    )
            if is_whole:
                o = acc / total[:, None]
                out_offset = (row * stride_ot + head * stride_oh)[:, None] + d[None, :]
                tl.store(out_ptr + out_offset, o.to(out_ptr.dtype.element_ty), mask=is_row)

        left -= stop - start
        start = 0
        slot = 2 * program + 1
        kv_head += 1
        tile += kv_head // KV_HEADS
        kv_head = kv_head % KV_HEADS


@triton.jit
def _attend(
    q,
    pool_ptr,
    block_table_ptr,
    position,
    num_tokens,
    first_block,
    end_block,
    page_stride,
    scale_log2,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum, sum and weighted values of the scores of a unit's blocks, in base 2."""
    d = tl.arange(0, HEAD_DIM)
    m = tl.full((BLOCK_ROWS,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    for block in range(first_block, end_block):
        token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        is_cached = token < num_tokens  # beyond lie stale bytes, which may be anything
        page = tl.load(block_table_ptr + token // PAGE_TOKENS, mask=is_cached, other=0)
        offset = page.to(tl.int64) * page_stride + token % PAGE_TOKENS * HEAD_DIM
        k_ptr = pool_ptr + offset[:, None] + d[None, :]
        k = tl.load(k_ptr, mask=is_cached[:, None], other=0.0)
        v_ptr = k_ptr + KV_HEADS * PAGE_TOKENS * HEAD_DIM
        v = tl.load(v_ptr, mask=is_cached[:, None], other=0.0)

        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        score = tl.where(token[None, :] <= position[:, None], score, -float("inf"))
        new_m = tl.maximum(m, tl.max(score, 1))
        weight = tl.exp2(score - new_m[:, None])
        keep = tl.exp2(m - new_m)
        total = total * keep + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        m = new_m
    return m, total, acc


@triton.jit
def _merge(
    partial_o_ptr,
    partial_ml_ptr,
    is_row,
    first,
    last,
    first_slot,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum and weighted values of a unit that the programs `first` to `last` share."""
    pair = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, HEAD_DIM)
    m = tl.full((BLOCK_ROWS,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    for program in tl.range(first, last + 1, num_stages=STAGES):
        slot = 2 * program + tl.where(program == first, first_slot, 0)
        part_m = tl.load(partial_ml_ptr + 2 * slot * BLOCK_ROWS + pair)
        part_total = tl.load(partial_ml_ptr + (2 * slot + 1) * BLOCK_ROWS + pair)
        o_offset = (slot * BLOCK_ROWS + pair)[:, None] * HEAD_DIM + d[None, :]
        part_o = tl.load(partial_o_ptr + o_offset, mask=is_row, other=0.0)
        new_m = tl.maximum(m, part_m)
        weight = tl.exp2(part_m - new_m)
        keep = tl.exp2(m - new_m)
        total = total * keep + weight * part_total
        acc = acc * keep[:, None] + weight[:, None] * part_o
        m = new_m
    return total, acc


def paged_attention(
    q_TQD: torch.Tensor,
    pool: PoolView,
    layer: int,
    block_table_SP: torch.Tensor,
    work: AttentionWork,
    out_TQD: torch.Tensor,
) -> None:
    """Write ``softmax(q k / sqrt(D)) v`` of the rows that `work` was planned for into `out_TQD`.

    Other rows are left as they are. The unit strides of q, out and the block table are required.
    """
    layout = pool.layout
    setting = work.setting
    head_dim = layout.geometry.head_dim
    _attention_kernel[(work.num_programs,)](
        q_TQD,
        pool.slices[layer:],
        block_table_SP,
        out_TQD,
        work.tile_N8,
        work.program_P4,
        work.share_1,
        work.partial_o,
        work.partial_ml,
        work.arrived_P,
        q_TQD.stride(0),
        q_TQD.stride(1),
        out_TQD.stride(0),
        out_TQD.stride(1),
        block_table_SP.stride(0),
        pool.layers * layout.slice_elements,
        LOG2_E / math.sqrt(head_dim),
        KV_HEADS=work.kv_heads,
        GROUP=work.group,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=layout.page_tokens,
        BLOCK_ROWS=setting.block_rows,
        BLOCK_TOKENS=setting.block_tokens,
        UNIT_COST=setting.unit_cost,
        MERGE_STAGES=setting.merge_stages,
        PRECISION="ieee" if q_TQD.dtype == torch.float32 else "tf32",
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
    )
