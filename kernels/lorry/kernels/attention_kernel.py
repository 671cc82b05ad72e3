"""The kernel of paged attention: split-KV over shares of a plan, merged by the last to finish.

Shape suffixes: T = rows of the step, Q = query heads, K = KV heads, D = head dimension,
S = sequences, P = pages of a sequence. A pair is a row and a query head of the unit's KV head.
"""

import triton
import triton.language as tl

from lorry.kernels.attention_block import NOTHING_SEEN, attend_block, merge_part
from lorry.kernels.attention_plan import PROGRAM_FIELDS, TILE_FIELDS, first_block_of
from lorry.kernels.dependent_launch import load_early, wait_for_kernels_before


@triton.jit
def attention_kernel(
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
    WINDOW: tl.constexpr,  # 0 is none
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    UNIT_COST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks its share of the costs, unit by unit.

    While it reads a unit, it looks up the next one's tile.
    Only its first and its last unit can be cut. Its part of the first is counted at once, when the
    program before has long begun the unit and will end with it; what the program is the last to
    count it merges at the end, so that no unit waits for another's merge.
    """
    program = tl.program_id(0)
    fields = program_ptr + program * PROGRAM_FIELDS
    first_tile = load_early(fields, True, 0)
    first_unit = first_tile * KV_HEADS + load_early(fields + 1, True, 0)
    start = load_early(fields + 2, True, 0)
    left = load_early(fields + 3, True, 0)
    share = load_early(share_ptr, True, 0)
    first_row, rows, sequence, position, cost_before, unit_blocks = _load_tile(
        tile_ptr, first_tile, left > 0
    )
    wait_for_kernels_before()

    pair = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, HEAD_DIM)
    unit = first_unit
    place = 0  # of a partial result: 0 the first unit's, 1 the others'
    merges = 0  # a bit for each place
    is_cut = False  # the last unit
    unit_start = 0
    last_blocks = 0
    while left > 0:
        kv_head = unit % KV_HEADS
        unit_start = cost_before + kv_head * (unit_blocks + UNIT_COST)
        last_blocks = unit_blocks
        stop = tl.minimum(unit_blocks + UNIT_COST, start + left)
        next_tile = _load_tile(tile_ptr, (unit + 1) // KV_HEADS, left > stop - start)
        first_block = tl.maximum(start - UNIT_COST, 0)
        count = stop - UNIT_COST - first_block
        if WINDOW:
            first_block += first_block_of(position, WINDOW, BLOCK_TOKENS)
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
                WINDOW,
                BLOCK_ROWS,
                BLOCK_TOKENS,
                PRECISION,
            )
            if count == unit_blocks:
                o = acc / total[:, None]
                out_offset = (row * stride_ot + head * stride_oh)[:, None] + d[None, :]
                tl.store(out_ptr + out_offset, o.to(out_ptr.dtype.element_ty), mask=is_row)
            else:
                slot = 2 * program + place
                o_offset = (slot * BLOCK_ROWS + pair)[:, None] * HEAD_DIM + d[None, :]
                tl.store(partial_o_ptr + o_offset, acc, mask=is_row)
                tl.store(partial_ml_ptr + 2 * slot * BLOCK_ROWS + pair, m)
                tl.store(partial_ml_ptr + (2 * slot + 1) * BLOCK_ROWS + pair, total)
                if place == 0:
                    merges = _is_last(arrived_ptr, share, unit_start, unit_blocks, UNIT_COST)
                else:
                    is_cut = True

        left -= stop - start
        start = 0
        place = 1
        unit += 1
        first_row, rows, sequence, position, cost_before, unit_blocks = next_tile

    if is_cut:
        merges += 2 * _is_last(arrived_ptr, share, unit_start, last_blocks, UNIT_COST)
    for place in tl.static_range(2):
        if (merges >> place) % 2 == 1:
            _finish(
                out_ptr,
                tile_ptr,
                share,
                partial_o_ptr,
                partial_ml_ptr,
                arrived_ptr,
                first_unit if place == 0 else unit - 1,
                stride_ot,
                stride_oh,
                KV_HEADS,
                GROUP,
                HEAD_DIM,
                BLOCK_ROWS,
                UNIT_COST,
            )


@triton.jit
def _load_tile(tile_ptr, tile, is_there):
    """First row, rows, sequence, position, cost before it and blocks of a tile, if it is there.

    May be called before the wait for the kernels before.
    """
    fields = tile_ptr + tile * TILE_FIELDS
    return (
        load_early(fields, is_there, 0),
        load_early(fields + 1, is_there, 0),
        load_early(fields + 2, is_there, 0),
        load_early(fields + 3, is_there, 0),
        load_early(fields + 4, is_there, 0),
        load_early(fields + 5, is_there, 0),
    )


@triton.jit
def _sharers(share, unit_start, unit_blocks, UNIT_COST: tl.constexpr):
    """The first and the last program that read blocks of a unit."""
    first_block = unit_start + UNIT_COST
    return first_block // share, (first_block + unit_blocks - 1) // share


@triton.jit
def _is_last(arrived_ptr, share, unit_start, unit_blocks, UNIT_COST: tl.constexpr):
    """Count this program's part of a cut unit; 1 if all parts are there now, else 0."""
    first, last = _sharers(share, unit_start, unit_blocks, UNIT_COST)
    tl.debug_barrier()  # all threads' partials precede the arrival
    arrived = tl.atomic_add(arrived_ptr + first, 1, sem="acq_rel")
    return (arrived == last - first).to(tl.int32)


@triton.jit
def _finish(
    out_ptr,
    tile_ptr,
    share,
    partial_o_ptr,
    partial_ml_ptr,
    arrived_ptr,
    unit,
    stride_ot,
    stride_oh,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UNIT_COST: tl.constexpr,
):
    """Merge all parts of a cut unit."""
    kv_head = unit % KV_HEADS
    first_row, rows, _, _, cost_before, unit_blocks = _load_tile(tile_ptr, unit // KV_HEADS, True)
    unit_start = cost_before + kv_head * (unit_blocks + UNIT_COST)
    first, last = _sharers(share, unit_start, unit_blocks, UNIT_COST)
    tl.store(arrived_ptr + first, 0)
    pair = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, HEAD_DIM)
    is_row = (pair // GROUP < rows)[:, None]
    total, acc = _merge(
        partial_o_ptr,
        partial_ml_ptr,
        is_row,
        first,
        last,
        (first * share < unit_start).to(tl.int32),
        HEAD_DIM,
        BLOCK_ROWS,
    )
    row = first_row.to(tl.int64) + pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    out_offset = (row * stride_ot + head * stride_oh)[:, None] + d[None, :]
    o = acc / total[:, None]
    tl.store(out_ptr + out_offset, o.to(out_ptr.dtype.element_ty), mask=is_row)


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
    WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum, sum and weighted values of the scores of a unit's blocks, in base 2."""
    if WINDOW:
        position = tl.minimum(position, num_tokens - 1)  # missing rows, too, see some token
    m = tl.full((BLOCK_ROWS,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    for block in range(first_block, end_block):
        m, total, acc = attend_block(
            q,
            m,
            total,
            acc,
            block,
            pool_ptr,
            block_table_ptr,
            position,
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
):
    """Sum and weighted values of a unit that the programs `first` to `last` share."""
    pair = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, HEAD_DIM)
    m = tl.full((BLOCK_ROWS,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    # Not staged through shared memory: most units have few parts, which takes longer then.
    for program in tl.range(first, last + 1, num_stages=1):
        slot = 2 * program + tl.where(program == first, first_slot, 0)
        part_m = tl.load(partial_ml_ptr + 2 * slot * BLOCK_ROWS + pair)
        part_total = tl.load(partial_ml_ptr + (2 * slot + 1) * BLOCK_ROWS + pair)
        o_offset = (slot * BLOCK_ROWS + pair)[:, None] * HEAD_DIM + d[None, :]
        part_o = tl.load(partial_o_ptr + o_offset, mask=is_row, other=0.0)
        m, total, acc = merge_part(m, total, acc, part_m, part_total, part_o)
    return total, acc
