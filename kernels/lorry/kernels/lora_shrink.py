"""The product of each row with its adapter's A: the first half of LoRA.

Shape suffixes as in `lora_plan`, I = input width.
"""

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.device import multiprocessors
from lorry.kernels.lora import AdapterTables
from lorry.kernels.lora_plan import LoraWork, load_piece
from lorry.kernels.pool_view import PoolView


# Scalars by layer and group lie anywhere: one kernel for all.
@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def _shrink_kernel(
    x_ptr,  # [T, I]
    pool_ptr,  # the layer's slice of page 0
    page_ptr,  # [S, pages of an adapter]
    piece_ptr,  # [N, 8]
    count_ptr,
    y_ptr,  # [splits, T, Y], float32
    stride_xt,
    stride_ps,
    stride_ys,
    stride_yt,
    page_stride,
    width,
    ROW_UNIT: tl.constexpr,
    SLICE_UNITS: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_VECTOR_FORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks the pieces; neighbours take the splits of one piece."""
    wait_for_kernels_before()
    programs = tl.num_programs(0)
    next_piece = load_piece(piece_ptr, tl.program_id(0) // SPLITS)
    num_work = tl.load(count_ptr) * SPLITS
    for work in range(tl.program_id(0), num_work, programs):
        row_, rows, slot_, first_rank, num_ranks, first_unit, _, _ = next_piece
        next_piece = load_piece(piece_ptr, tl.minimum(work + programs, num_work - 1) // SPLITS)
        row = row_.to(tl.int64)
        slot = slot_.to(tl.int64)
        split = work % SPLITS
        pages = page_ptr + slot * stride_ps
        rank = first_rank + tl.arange(0, RANKS)
        is_rank = rank < num_ranks
        unit = first_unit + rank * ROW_UNITS + split * STEPS
        steps = tl.minimum(ROW_UNITS - split * STEPS, STEPS)
        i = split * STEPS * ROW_UNIT + tl.arange(0, ROW_UNIT)
        # The pages of a rank's units, which seldom lie in more than two, are found before the loop:
        # in it, one load would wait for another in every step.
        first_page = tl.load(pages + unit // SLICE_UNITS, mask=is_rank, other=0)
        last_page = tl.load(pages + (unit + steps - 1) // SLICE_UNITS, mask=is_rank, other=0)
        y_offset = split.to(tl.int64) * stride_ys + row * stride_yt
        if (rows == 1) & HAS_VECTOR_FORM:
            acc = tl.zeros((RANKS, ROW_UNIT), tl.float32)
            for step in tl.range(0, steps, num_stages=STAGES):
                a = _load_a(
                    pool_ptr,
                    pages,
                    first_page,
                    last_page,
                    unit,
                    step,
                    is_rank,
                    page_stride,
                    ROW_UNIT,
                    SLICE_UNITS,
                    STEPS,
                )
                k = i + step * ROW_UNIT
                x = tl.load(x_ptr + row * stride_xt + k, mask=k < width, other=0.0)
                acc += a.to(tl.float32) * x.to(tl.float32)[None, :]
            tl.store(y_ptr + y_offset + rank, tl.sum(acc, 1), mask=is_rank)
        else:
            t = tl.arange(0, TILE_ROWS)
            is_row = (t < rows)[:, None]
            y = tl.zeros((TILE_ROWS, RANKS), tl.float32)
            for step in tl.range(0, steps, num_stages=STAGES):
                a = _load_a(
                    pool_ptr,
                    pages,
                    first_page,
                    last_page,
                    unit,
                    step,
                    is_rank,
                    page_stride,
                    ROW_UNIT,
                    SLICE_UNITS,
                    STEPS,
                )
                k = i + step * ROW_UNIT
                x_offset = (row + t)[:, None] * stride_xt + k[None, :]
                x = tl.load(x_ptr + x_offset, mask=is_row & (k < width)[None, :], other=0.0)
                y = tl.dot(x, tl.trans(a), y, input_precision=PRECISION)
            y_ptrs = y_ptr + y_offset + t[:, None] * stride_yt + rank[None, :]
            tl.store(y_ptrs, y, mask=is_row & is_rank[None, :])


@triton.jit
def _load_a(
    pool_ptr,
    page_ptr,
    first_page,
    last_page,
    first_unit,
    step,
    is_rank,
    page_stride,
    ROW_UNIT: tl.constexpr,
    SLICE_UNITS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The row unit of each rank's A that is `step` units after its first."""
    in_unit = tl.arange(0, ROW_UNIT)[None, :]
    unit = first_unit + step
    if STEPS > SLICE_UNITS + 1:  # there may be pages between the first and the last
        return load_units(
            pool_ptr, page_ptr, unit, is_rank, in_unit, page_stride, ROW_UNIT, SLICE_UNITS
        )
    is_in_first = unit // SLICE_UNITS == first_unit // SLICE_UNITS
    page = tl.where(is_in_first, first_page, last_page).to(tl.int64)
    offset = page * page_stride + unit % SLICE_UNITS * ROW_UNIT
    return tl.load(pool_ptr + offset[:, None] + in_unit, mask=is_rank[:, None], other=0.0)


@triton.jit
def load_units(
    pool_ptr,
    page_ptr,
    unit,
    is_row,
    in_unit,
    page_stride,
    ROW_UNIT: tl.constexpr,
    SLICE_UNITS: tl.constexpr,
):
    """Elements `in_unit` of each row unit in the last dimension; zero where `is_row` is not set."""
    page = tl.load(page_ptr + unit // SLICE_UNITS, mask=is_row, other=0)
    offset = page.to(tl.int64) * page_stride + unit % SLICE_UNITS * ROW_UNIT
    element = tl.expand_dims(offset, -1) + in_unit
    return tl.load(pool_ptr + element, mask=tl.expand_dims(is_row, -1), other=0.0)


def lora_shrink(
    x_TI: torch.Tensor,
    group: int,
    pool: PoolView,
    tables: AdapterTables,
    layer: int,
    work: LoraWork,
) -> torch.Tensor:
    """Return partial sums of ``x A^T`` over a group's stacked A: ``[splits, T, Y]`` in `work`.

    Column ``i * rank + r`` belongs to rank r of the i-th module that the adapter has; columns and
    rows without adapter are not written. Valid until the next call with this `work`.
    """
    layout, setting = pool.layout, work.setting
    num_rows, width = x_TI.shape
    row_units = triton.cdiv(width, layout.row_unit)
    y_STY = work.partial_sums(num_rows, width)
    programs = multiprocessors(x_TI.device) * setting.shrink_programs_per_multiprocessor
    _shrink_kernel[(programs,)](
        x_TI,
        pool.slices[layer:],
        tables.page_SP,
        work.shrink_GN8[group],
        work.count_G2[group],
        y_STY,
        x_TI.stride(0),
        tables.page_SP.stride(0),
        y_STY.stride(0),
        y_STY.stride(1),
        pool.layers * layout.slice_elements,
        width,
        ROW_UNIT=layout.row_unit,
        SLICE_UNITS=layout.slice_units,
        ROW_UNITS=row_units,
        STEPS=triton.cdiv(row_units, y_STY.shape[0]),
        SPLITS=y_STY.shape[0],
        TILE_ROWS=setting.tile_rows,
        RANKS=setting.shrink_ranks,
        STAGES=setting.shrink_stages,
        HAS_VECTOR_FORM=setting.has_vector_form,
        PRECISION="ieee" if x_TI.dtype == torch.float32 else "tf32",
        num_warps=setting.shrink_warps,
        num_stages=setting.shrink_stages,
        maxnreg=setting.shrink_registers,
        launch_pdl=has_dependent_launch(x_TI.device),
    )
    return y_STY
