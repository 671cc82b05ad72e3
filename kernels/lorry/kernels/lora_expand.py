"""The product with each adapter's B, added to the base model's output: the second half of LoRA.

Shape suffixes as in `lora_plan`, O = output width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.device import multiprocessors
from lorry.kernels.lora import AdapterTables
from lorry.kernels.lora_plan import FIRST_MODULE, LoraWork, load_piece
from lorry.kernels.lora_product import matrix_product, vector_product
from lorry.kernels.page_layout import GROUPS, QKV
from lorry.kernels.pool_view import PoolView

DEALT_COLUMNS = 128  # at most, where ranks are dealt out: with more, their addresses would spill


# Scalars by layer and group lie anywhere: one kernel for all.
@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "count_ptr"])
def _expand_kernel(
    out_ptr,  # [T, O] of the group's first module
    pool_ptr,  # the layer's slice of page 0
    page_ptr,  # [S, pages of an adapter]
    scale_ptr,  # [S, L, X], at the layer and the group's first module
    piece_ptr,  # [N, 8]
    count_ptr,
    y_ptr,  # [splits, T, Y], float32
    offset_1,  # elements from the first module's output to the second's, and to the third's
    offset_2,
    width_0,
    width_1,
    width_2,
    stride_ot_0,
    stride_ot_1,
    stride_ot_2,
    stride_ps,
    stride_ss,
    stride_ys,
    stride_yt,
    page_stride,
    ROW_UNIT: tl.constexpr,
    SLICE_UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    WAYS: tl.constexpr,  # each with its share of y, and no splits if more than 1
    TILE_ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR_UNITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_VECTOR_FORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks the pieces: row units of a tile's output."""
    wait_for_kernels_before()
    programs = tl.num_programs(0)
    next_piece = load_piece(piece_ptr, tl.program_id(0))
    num_work = tl.load(count_ptr + 1)
    for work in range(tl.program_id(0), num_work, programs):
        row_, rows, slot_, module, column_unit, first_unit, num_ranks, y_column = next_piece
        next_piece = load_piece(piece_ptr, tl.minimum(work + programs, num_work - 1))
        row = row_.to(tl.int64)
        slot = slot_.to(tl.int64)
        width = tl.where(module == 0, width_0, tl.where(module == 1, width_1, width_2))
        stride_ot = tl.where(
            module == 0, stride_ot_0, tl.where(module == 1, stride_ot_1, stride_ot_2)
        )
        out_offset = tl.where(module == 0, 0, tl.where(module == 1, offset_1, offset_2))
        outs = out_ptr + out_offset + row * stride_ot
        unit = first_unit + column_unit
        row_units = (width + ROW_UNIT - 1) // ROW_UNIT
        ys = y_ptr + row * stride_yt + y_column
        pages = page_ptr + slot * stride_ps
        scale = tl.load(scale_ptr + slot * stride_ss + module)
        if (rows == 1) & HAS_VECTOR_FORM:
            in_piece = tl.arange(0, VECTOR_UNITS)
            column = (column_unit + in_piece)[:, None] * ROW_UNIT + tl.arange(0, ROW_UNIT)[None, :]
            is_column = column < width
            base = tl.load(outs + column, mask=is_column, other=0.0).to(tl.float32)
            acc = vector_product(
                pool_ptr,
                pages,
                unit,
                column_unit,
                row_units,
                num_ranks,
                ys,
                stride_ys,
                page_stride,
                ROW_UNIT,
                SLICE_UNITS,
                SPLITS,
                SPLITS_BLOCK,
                WAYS,
                RANKS,
                VECTOR_UNITS,
            )
            total = base + scale * acc
            tl.store(outs + column, total.to(out_ptr.dtype.element_ty), mask=is_column)
        else:
            t = tl.arange(0, TILE_ROWS)
            is_row = (t < rows)[:, None]
            for first_column in range(0, ROW_UNIT, COLUMNS):
                in_unit = first_column + tl.arange(0, COLUMNS)
                tile_acc = matrix_product(
                    pool_ptr,
                    pages,
                    unit,
                    in_unit,
                    row_units,
                    num_ranks,
                    ys,
                    is_row,
                    stride_ys,
                    stride_yt,
                    page_stride,
                    ROW_UNIT,
                    SLICE_UNITS,
                    SPLITS,
                    WAYS,
                    TILE_ROWS,
                    RANKS,
                    COLUMNS,
                    STAGES,
                    PRECISION,
                )
                tile_column = column_unit * ROW_UNIT + in_unit
                out_ptrs = outs + t[:, None] * stride_ot + tile_column[None, :]
                is_mine = is_row & (tile_column < width)[None, :]
                tile_base = tl.load(out_ptrs, mask=is_mine, other=0.0).to(tl.float32)
                tile_total = tile_base + scale * tile_acc
                tl.store(out_ptrs, tile_total.to(out_ptr.dtype.element_ty), mask=is_mine)


def lora_expand_add(
    outputs: Sequence[torch.Tensor],
    group: int,
    pool: PoolView,
    tables: AdapterTables,
    layer: int,
    work: LoraWork,
    y_STY: torch.Tensor,
) -> None:
    """Add ``scale * y B^T`` of a group's modules to `outputs`, one [T, O] for each module.

    `y_STY` is what `lora_shrink` returned for the group, or, where rows of A are dealt out over
    tensor-parallel ranks, the sums of these of each rank. In the matrix form y is rounded to the
    dtype of the weights first.
    """
    assert not (group == QKV and work.rotates), "the plan is one of expand_rope_write_kv"
    ways = work.ways_G[group]
    splits = y_STY.shape[0] if ways == 1 else 1
    layout, setting = pool.layout, work.setting
    columns = min(setting.expand_columns, layout.row_unit)
    # A group of fewer modules repeats the first: a stride of 1 would unalign what is selected.
    first, second, third = [*outputs, outputs[0], outputs[0]][: len(GROUPS[0])]
    programs = multiprocessors(first.device) * setting.expand_programs_per_multiprocessor
    scale_SX = tables.scale_SLX[:, layer, FIRST_MODULE[group] :]
    _expand_kernel[(programs,)](
        first,
        pool.slices[layer:],
        tables.page_SP,
        scale_SX,
        work.expand_GN8[group],
        work.count_G2[group],
        y_STY,
        _elements_between(first, second),
        _elements_between(first, third),
        first.shape[1],
        second.shape[1],
        third.shape[1],
        first.stride(0),
        second.stride(0),
        third.stride(0),
        tables.page_SP.stride(0),
        scale_SX.stride(0),
        y_STY.stride(0),
        y_STY.stride(1),
        pool.layers * layout.slice_elements,
        ROW_UNIT=layout.row_unit,
        SLICE_UNITS=layout.slice_units,
        SPLITS=splits,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        WAYS=ways,
        TILE_ROWS=setting.tile_rows,
        RANKS=setting.expand_ranks,
        COLUMNS=columns if ways == 1 else min(columns, DEALT_COLUMNS),
        VECTOR_UNITS=setting.vector_units,
        STAGES=setting.expand_stages,
        HAS_VECTOR_FORM=setting.has_vector_form,
        PRECISION="ieee" if first.dtype == torch.float32 else "tf32",
        num_warps=setting.expand_warps,
        num_stages=setting.expand_stages,
        maxnreg=setting.expand_registers,
        launch_pdl=has_dependent_launch(first.device),
    )


def _elements_between(first: torch.Tensor, other: torch.Tensor) -> int:
    """Any two tensors of a device are one base and an offset; q, k and v are often views of one."""
    return (other.data_ptr() - first.data_ptr()) // first.element_size()
