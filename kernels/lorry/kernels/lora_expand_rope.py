"""The second half of LoRA of q, k and v in one kernel with their rotation and the write of KV.

One pass over the rows instead of two: what `lora_expand` and `rope` do, and rounded as they do.
Shape suffixes as in `lora_plan` and `rope`, O = output width of q, k and v together.
"""

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.device import multiprocessors
from lorry.kernels.lora import AdapterTables, lora_reference
from lorry.kernels.lora_plan import LoraWork, load_piece
from lorry.kernels.lora_product import matrix_product, vector_product
from lorry.kernels.page_layout import GROUPS, QKV, PageLayout
from lorry.kernels.pool_view import PoolView
from lorry.kernels.rope import rope_write_kv_reference
from lorry.kernels.rope_heads import load_angles, write_heads
from lorry.kernels.tiles import RowTiles


def expand_rope_write_kv_reference(
    x_TI: torch.Tensor,
    qkv_TO: torch.Tensor,
    cos_sin_L2D: torch.Tensor,
    position_T: torch.Tensor,
    page_T: torch.Tensor,
    pool: PoolView,
    tables: AdapterTables,
    layer: int,
    tiles: RowTiles,
) -> torch.Tensor:
    """Return rotated queries; write rotated keys and the values into ``pool``.

    `qkv_TO` is the base model's and gets each row's adapter added; see `lora_reference` and
    `rope_write_kv_reference`.
    """
    geometry = pool.layout.local_geometry
    parts = qkv_TO.split(geometry.group_widths(QKV), dim=1)
    lora_reference(x_TI, parts, GROUPS[QKV], pool, tables, layer, tiles)
    q, k, v = (part.view(len(part), -1, geometry.head_dim) for part in parts)
    return rope_write_kv_reference(q, k, v, cos_sin_L2D, position_T, page_T, pool, layer)


# Scalars by layer and group lie anywhere: one kernel for all.
@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "count_ptr"])
def _expand_rope_kernel(
    qkv_ptr,  # [T, O]; queries are rotated in place
    cos_sin_ptr,  # [L, 2, D]
    position_ptr,  # [T]
    kv_page_ptr,  # [T]
    pool_ptr,  # the layer's slice of page 0
    page_ptr,  # [S, pages of an adapter]
    scale_ptr,  # [S, L, X], at the layer
    piece_ptr,  # [N, 8]
    count_ptr,
    y_ptr,  # [splits, T, Y], float32
    stride_ot,
    stride_ps,
    stride_ss,
    stride_ys,
    stride_yt,
    page_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    SLICE_UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR_UNITS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks the pieces: row units of a tile's output, which hold whole heads."""
    wait_for_kernels_before()
    programs = tl.num_programs(0)
    next_piece = load_piece(piece_ptr, tl.program_id(0))
    num_work = tl.load(count_ptr + 1)
    for work in range(tl.program_id(0), num_work, programs):
        row_, rows, slot_, module, column_unit, first_unit, num_ranks, y_column = next_piece
        next_piece = load_piece(piece_ptr, tl.minimum(work + programs, num_work - 1))
        row = row_.to(tl.int64)
        slot = tl.maximum(slot_, 0).to(tl.int64)  # rows without adapter are of rank 0
        module_heads = tl.where(module == 0, QUERY_HEADS, KV_HEADS)
        heads_before = tl.where(module == 0, 0, QUERY_HEADS + (module - 1) * KV_HEADS)
        width = module_heads * HEAD_DIM
        outs = qkv_ptr + row * stride_ot + heads_before * HEAD_DIM
        unit = first_unit + column_unit
        row_units = (width + ROW_UNIT - 1) // ROW_UNIT
        ys = y_ptr + row * stride_yt + y_column
        pages = page_ptr + slot * stride_ps
        scale = tl.load(scale_ptr + slot * stride_ss + module, mask=num_ranks > 0, other=0.0)
        if rows == 1:
            one = tl.arange(0, 1)
            is_one = one == 0
            position = tl.load(position_ptr + row + one)
            kv_page = tl.load(kv_page_ptr + row + one)
            angles = load_angles(cos_sin_ptr, position, is_one, HEAD_DIM)
            unit_column = tl.arange(0, VECTOR_UNITS)[:, None] * ROW_UNIT
            column = column_unit * ROW_UNIT + unit_column + tl.arange(0, ROW_UNIT)[None, :]
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
                1,
                RANKS,
                VECTOR_UNITS,
            )
            total = (base + scale * acc).to(qkv_ptr.dtype.element_ty)
            write_heads(
                total,
                angles,
                outs,
                pool_ptr,
                position,
                kv_page,
                is_one,
                module,
                column_unit * (ROW_UNIT // HEAD_DIM),
                module_heads,
                stride_ot,
                page_stride,
                KV_HEADS,
                HEAD_DIM,
                PAGE_TOKENS,
                1,
                VECTOR_UNITS * ROW_UNIT,
            )
        else:
            t = tl.arange(0, TILE_ROWS)
            is_row = t < rows
            tile_position = tl.load(position_ptr + row + t, mask=is_row, other=0)
            tile_kv_page = tl.load(kv_page_ptr + row + t, mask=is_row, other=0)
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
                    is_row[:, None],
                    stride_ys,
                    stride_yt,
                    page_stride,
                    ROW_UNIT,
                    SLICE_UNITS,
                    SPLITS,
                    1,
                    TILE_ROWS,
                    RANKS,
                    COLUMNS,
                    STAGES,
                    PRECISION,
                )
                tile_column = column_unit * ROW_UNIT + in_unit
                out_ptrs = outs + t[:, None] * stride_ot + tile_column[None, :]
                is_mine = is_row[:, None] & (tile_column < width)[None, :]
                tile_base = tl.load(out_ptrs, mask=is_mine, other=0.0).to(tl.float32)
                tile_total = (tile_base + scale * tile_acc).to(qkv_ptr.dtype.element_ty)
                write_heads(
                    tile_total,
                    load_angles(cos_sin_ptr, tile_position, is_row, HEAD_DIM),
                    outs,
                    pool_ptr,
                    tile_position,
                    tile_kv_page,
                    is_row,
                    module,
                    (column_unit * ROW_UNIT + first_column) // HEAD_DIM,
                    module_heads,
                    stride_ot,
                    page_stride,
                    KV_HEADS,
                    HEAD_DIM,
                    PAGE_TOKENS,
                    TILE_ROWS,
                    COLUMNS,
                )


def can_expand_rope(layout: PageLayout) -> bool:
    """Whether row units of q, k and v hold whole heads, and each rank all rows of A."""
    return layout.row_unit % layout.geometry.head_dim == 0 and layout.a_ways(GROUPS[QKV][0]) == 1


def expand_rope_write_kv(
    qkv_TO: torch.Tensor,
    cos_sin_L2D: torch.Tensor,
    position_T: torch.Tensor,
    page_T: torch.Tensor,
    pool: PoolView,
    tables: AdapterTables,
    layer: int,
    work: LoraWork,
    y_STY: torch.Tensor,
) -> None:
    """`lora_expand_add` of q, k and v, then `rope_write_kv`, of all rows.

    The keys and values in `qkv_TO` stay the base model's. `work` is of a plan that rotates, and the
    layout one that `can_expand_rope`.
    """
    assert work.rotates, "the plan is one of lora_expand_add"
    layout, setting = pool.layout, work.setting
    geometry, splits = layout.local_geometry, y_STY.shape[0]
    programs = multiprocessors(qkv_TO.device) * setting.expand_programs_per_multiprocessor
    scale_SX = tables.scale_SLX[:, layer]
    _expand_rope_kernel[(programs,)](
        qkv_TO,
        cos_sin_L2D,
        position_T,
        page_T,
        pool.slices[layer:],
        tables.page_SP,
        scale_SX,
        work.expand_GN8[QKV],
        work.count_G2[QKV],
        y_STY,
        qkv_TO.stride(0),
        tables.page_SP.stride(0),
        scale_SX.stride(0),
        y_STY.stride(0),
        y_STY.stride(1),
        pool.layers * layout.slice_elements,
        QUERY_HEADS=geometry.heads,
        KV_HEADS=geometry.kv_heads,
        HEAD_DIM=geometry.head_dim,
        PAGE_TOKENS=layout.page_tokens,
        ROW_UNIT=layout.row_unit,
        SLICE_UNITS=layout.slice_units,
        SPLITS=splits,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        TILE_ROWS=setting.tile_rows,
        RANKS=setting.expand_ranks,
        COLUMNS=max(min(setting.expand_columns, layout.row_unit), geometry.head_dim),
        VECTOR_UNITS=setting.vector_units,
        STAGES=setting.expand_stages,
        PRECISION="ieee" if qkv_TO.dtype == torch.float32 else "tf32",
        num_warps=setting.expand_warps,
        num_stages=setting.expand_stages,
        maxnreg=setting.rotating_registers,
        launch_pdl=has_dependent_launch(qkv_TO.device),
    )
