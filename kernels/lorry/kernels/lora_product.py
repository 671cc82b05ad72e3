"""The product of rows of LoRA's intermediate ``y`` with an adapter's B, in vector and matrix form.

Parts of the kernels of `lora_expand` and `lora_expand_rope`. Shape suffixes as in `lora_plan`.
"""

import triton
import triton.language as tl

from lorry.kernels.lora_shrink import load_units

UNROLLED_SPLITS = tl.constexpr(4)  # loads in flight; all of them would spill registers


@triton.jit
def vector_product(
    pool_ptr,
    pages,
    unit,  # the first of B's first row in the piece
    column_unit,
    row_units,
    num_ranks,
    ys,
    stride_ys,
    page_stride,
    ROW_UNIT: tl.constexpr,
    SLICE_UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    RANKS: tl.constexpr,
    VECTOR_UNITS: tl.constexpr,
):
    """A row's ``y B^T`` over the row units of a piece, ``[VECTOR_UNITS, ROW_UNIT]``."""
    in_piece = tl.arange(0, VECTOR_UNITS)
    is_unit = column_unit + in_piece < row_units
    splits = tl.arange(0, SPLITS_BLOCK)
    acc = tl.zeros((VECTOR_UNITS, ROW_UNIT), tl.float32)
    for start in range(0, num_ranks, RANKS):
        rank = start + tl.arange(0, RANKS)
        is_rank = rank < num_ranks
        b = load_units(
            pool_ptr,
            pages,
            unit + in_piece[:, None] + rank[None, :] * row_units,
            is_unit[:, None] & is_rank[None, :],
            tl.arange(0, ROW_UNIT)[None, None, :],
            page_stride,
            ROW_UNIT,
            SLICE_UNITS,
        )
        share = dealt(rank, stride_ys, WAYS)
        y_ptrs = ys + splits[:, None] * stride_ys + share[None, :]
        is_y = (splits < SPLITS)[:, None] & is_rank[None, :]
        y = tl.sum(tl.load(y_ptrs, mask=is_y, other=0.0), 0)
        acc += tl.sum(y[None, :, None] * b.to(tl.float32), 1)  # in this order a warp owns a unit
    return acc


@triton.jit
def matrix_product(
    pool_ptr,
    pages,
    unit,  # of B's first row
    in_unit,
    row_units,
    num_ranks,
    ys,
    is_row,
    stride_ys,
    stride_yt,
    page_stride,
    ROW_UNIT: tl.constexpr,
    SLICE_UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
    WAYS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile's ``y B^T`` at the elements `in_unit` of a row unit, ``[TILE_ROWS, COLUMNS]``."""
    t = tl.arange(0, TILE_ROWS)
    acc = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, num_ranks, RANKS, num_stages=STAGES):
        rank = start + tl.arange(0, RANKS)
        is_rank = rank < num_ranks
        b = load_units(
            pool_ptr,
            pages,
            unit + rank * row_units,
            is_rank,
            in_unit[None, :],
            page_stride,
            ROW_UNIT,
            SLICE_UNITS,
        )
        is_y = is_row & is_rank[None, :]
        y = tl.zeros((TILE_ROWS, RANKS), tl.float32)
        share = dealt(rank, stride_ys, WAYS)
        y_ptrs = ys + t[:, None] * stride_yt + share[None, :]
        for split in tl.range(0, SPLITS, loop_unroll_factor=UNROLLED_SPLITS):
            y += tl.load(y_ptrs + split * stride_ys, mask=is_y, other=0.0)
        acc = tl.dot(y.to(b.dtype), b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dealt(rank, stride, WAYS: tl.constexpr):
    """Where the columns of ranks are that are dealt out one by one over `WAYS` shares."""
    if WAYS == 1:
        return rank
    return rank % WAYS * stride + rank // WAYS
