"""The work lists of LoRA, planned on the device once per step for all layers.

Rows of a step that follow each other and share an adapter form a run; runs are cut into tiles. For
each group of modules that read the same input a tile becomes pieces of work: shrink pieces, blocks
of rows of the group's stacked A, and expand pieces, row units of a module's output. Base rows and
absent modules become no piece, and a small rank becomes few. But no row goes without rotation: in a
plan whose expand of q, k and v also rotates, their pieces cover all outputs, some at rank 0.

Shape suffixes: T = rows of the step, S = slots, X = modules (in the order of MODULES), G = groups,
N = pieces of a group, Y = columns of the intermediate.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.device import multiprocessors
from lorry.kernels.lora import AdapterTables
from lorry.kernels.page_layout import GROUPS, MAX_RANK, MODULES, QKV, PageLayout
from lorry.kernels.runs import run_bounds

# shrink: row, rows, slot, first row of stacked A, rows of stacked A, unit of stacked A
# expand: row, rows, slot, module of the group, row unit, unit of B, rank, first column of y
PIECE_FIELDS = tl.constexpr(8)
INTERMEDIATE_COLUMNS = max(len(group) for group in GROUPS) * MAX_RANK
NO_GROUP = -1
PLANNERS = 8  # programs of a group that share the writing of its pieces
ROWS_OF_8_WARPS = 512  # more rows than these would spill registers
FIRST_MODULE = tuple(MODULES.index(group[0]) for group in GROUPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSetting:
    """Launch setting of shrink and expand.

    Tiles of one row take the vector form, if there is one, others the matrix form.
    """

    tile_rows: int
    shrink_ranks: int  # rows of stacked A in a piece
    shrink_splits: int  # programs that share a piece; each writes a partial sum
    shrink_programs_per_multiprocessor: int
    shrink_warps: int
    shrink_stages: int
    shrink_registers: int | None = None  # of a thread at most, so that more programs run at once
    expand_ranks: int  # rows of B in a step
    expand_columns: int  # of the matrix form at a time, at most a row unit
    expand_programs_per_multiprocessor: int
    expand_warps: int
    expand_stages: int  # of the matrix form
    expand_registers: int | None = None  # likewise
    rotating_registers: int | None = None  # of an expand of q, k and v that rotates them too
    has_vector_form: bool = True  # without, a row's sums do not depend on how many rows beside it

    @property
    def vector_units(self) -> int:
        """Row units of an expand piece of one row: a warp sums one without the others."""
        return self.expand_warps if self.has_vector_form else 1


@dataclass(frozen=True, slots=True)
class LoraWork:
    """Device memory of a plan and of the products with A made under it; for one group at a time."""

    setting: LoraSetting
    layout: PageLayout
    max_rows: int
    row_units_X: torch.Tensor  # int32, row units of each module's output
    ways_G: tuple[int, ...]  # over how many tensor-parallel ranks rows of A are dealt out
    shrink_GN8: torch.Tensor  # int32
    expand_GN8: torch.Tensor  # int32
    count_G2: torch.Tensor  # int32, pieces of shrink and of expand
    y: torch.Tensor  # float32, splits * T * Y at most
    rotates: bool  # the expand of q, k and v

    def splits(self, width: int) -> int:
        """Partial sums of a product with A whose input is `width` wide."""
        return min(self.setting.shrink_splits, math.ceil(width / self.layout.row_unit))

    def partial_sums(self, num_rows: int, width: int) -> torch.Tensor:
        """``[splits, T, Y]`` for `num_rows` rows of an input of `width`."""
        shape = (self.splits(width), num_rows, INTERMEDIATE_COLUMNS)
        return self.y[: math.prod(shape)].view(shape)


def allocate_lora_work(
    setting: LoraSetting,
    layout: PageLayout,
    *,
    max_rows: int,
    device: torch.device,
    rotates: bool = False,
) -> LoraWork:
    """Memory for plans of up to `max_rows` rows; of `expand_rope_write_kv` where it `rotates`."""
    units = [layout.row_widths(module)[1] // layout.row_unit for module in MODULES]
    most_units = max(sum(units[MODULES.index(m)] for m in group) for group in GROUPS)
    shrink_pieces = max_rows * triton.cdiv(INTERMEDIATE_COLUMNS, setting.shrink_ranks)
    zeros = partial(torch.zeros, dtype=torch.int32, device=device)
    columns = setting.shrink_splits * max_rows * INTERMEDIATE_COLUMNS

    def pieces(most: int, programs_per_multiprocessor: int) -> torch.Tensor:
        """A program loads the piece of its number before it knows how many there are."""
        programs = multiprocessors(device) * programs_per_multiprocessor
        return zeros(len(GROUPS), max(most, programs), PIECE_FIELDS.value)

    return LoraWork(
        setting=setting,
        layout=layout,
        max_rows=max_rows,
        row_units_X=torch.tensor(units, dtype=torch.int32, device=device),
        ways_G=tuple(layout.a_ways(group[0]) for group in GROUPS),
        shrink_GN8=pieces(shrink_pieces, setting.shrink_programs_per_multiprocessor),
        expand_GN8=pieces(max_rows * most_units, setting.expand_programs_per_multiprocessor),
        count_G2=zeros(len(GROUPS), 2),
        y=torch.empty(columns, dtype=torch.float32, device=device),
        rotates=rotates,
    )


@triton.jit
def load_piece(piece_ptr, piece):
    """The fields of a piece of work."""
    fields = piece_ptr + piece * PIECE_FIELDS
    return (
        tl.load(fields),
        tl.load(fields + 1),
        tl.load(fields + 2),
        tl.load(fields + 3),
        tl.load(fields + 4),
        tl.load(fields + 5),
        tl.load(fields + 6),
        tl.load(fields + 7),
    )


@triton.jit
def _plan_kernel(
    slot_ptr,  # [T]
    rank_ptr,  # [S]
    a_offset_ptr,  # [S, X]
    b_offset_ptr,  # [S, X]
    row_units_ptr,  # [X]
    shrink_ptr,  # [G, N, 8]
    expand_ptr,  # [G, N, 8]
    count_ptr,  # [G, 2]
    num_rows,
    shrink_capacity,
    expand_capacity,
    MODULES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    GROUP_MODULES: tl.constexpr,
    WAYS: tl.constexpr,
    WHOLE_GROUP: tl.constexpr,  # whose expand pieces cover all outputs of all rows
    TILE_ROWS: tl.constexpr,
    SHRINK_RANKS: tl.constexpr,
    VECTOR_UNITS: tl.constexpr,
    PLANNERS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Every planner of a group cuts all tiles and stores its share of the pieces."""
    wait_for_kernels_before()
    planner = tl.program_id(0)
    group = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    slot = tl.load(slot_ptr + t, mask=t < num_rows, other=-1)
    first, end = run_bounds(slot, slot_ptr, t, num_rows, BLOCK_T)
    is_first = (t < num_rows) & ((t - first) % TILE_ROWS == 0)
    is_tile = is_first & (slot >= 0)
    rows = tl.minimum(end - t, TILE_ROWS)
    rank = tl.load(rank_ptr + slot, mask=is_tile, other=0)

    first_module = 0
    group_modules = 0
    ways = 1
    for g in tl.static_range(len(FIRST_MODULE)):
        if group == g:
            first_module = FIRST_MODULE[g]
            group_modules = GROUP_MODULES[g]
            ways = WAYS[g]
    a_rows = (rank + ways - 1) // ways  # of a module
    is_whole = is_first & (group == WHOLE_GROUP)

    a_ptr = a_offset_ptr + slot * MODULES + first_module
    b_ptr = b_offset_ptr + slot * MODULES + first_module
    stacked = tl.zeros((BLOCK_T,), tl.int32)
    a_unit = tl.full((BLOCK_T,), 0x7FFFFFFF, tl.int32)
    units = tl.zeros((BLOCK_T,), tl.int32)
    step = tl.where(rows == 1, VECTOR_UNITS, 1)
    for module in range(0, group_modules):
        offset = tl.load(a_ptr + module, mask=is_tile, other=-1)
        is_present = offset >= 0
        stacked += tl.where(is_present, a_rows, 0)
        a_unit = tl.where(is_present, tl.minimum(a_unit, offset), a_unit)
        row_units = tl.load(row_units_ptr + first_module + module)
        units += tl.where(is_present | is_whole, (row_units + step - 1) // step, 0)

    pieces = (stacked + SHRINK_RANKS - 1) // SHRINK_RANKS
    piece = tl.cumsum(pieces, 0) - pieces
    fields = shrink_ptr + (group.to(tl.int64) * shrink_capacity + piece) * PIECE_FIELDS
    for j in range(planner, tl.max(pieces, 0), PLANNERS):
        is_mine = j < pieces
        tl.store(fields + j * PIECE_FIELDS, t, mask=is_mine)
        tl.store(fields + j * PIECE_FIELDS + 1, rows, mask=is_mine)
        tl.store(fields + j * PIECE_FIELDS + 2, slot, mask=is_mine)
        tl.store(fields + j * PIECE_FIELDS + 3, j * SHRINK_RANKS + slot * 0, mask=is_mine)
        tl.store(fields + j * PIECE_FIELDS + 4, stacked, mask=is_mine)
        tl.store(fields + j * PIECE_FIELDS + 5, a_unit, mask=is_mine)

    unit_piece = tl.cumsum(units, 0) - units
    fields = expand_ptr + (group.to(tl.int64) * expand_capacity + unit_piece) * PIECE_FIELDS
    y_column = tl.zeros((BLOCK_T,), tl.int32)
    for module in range(0, group_modules):
        offset = tl.load(b_ptr + module, mask=is_tile, other=-1)
        is_present = offset >= 0
        row_units = tl.load(row_units_ptr + first_module + module)
        for j in range(planner, row_units, PLANNERS):
            is_mine = (is_present | is_whole) & (j * step < row_units)
            tl.store(fields + j * PIECE_FIELDS, t, mask=is_mine)
            tl.store(fields + j * PIECE_FIELDS + 1, rows, mask=is_mine)
            tl.store(fields + j * PIECE_FIELDS + 2, slot, mask=is_mine)
            tl.store(fields + j * PIECE_FIELDS + 3, module + slot * 0, mask=is_mine)
            tl.store(fields + j * PIECE_FIELDS + 4, j * step, mask=is_mine)
            tl.store(fields + j * PIECE_FIELDS + 5, offset, mask=is_mine)
            tl.store(fields + j * PIECE_FIELDS + 6, rank * is_present, mask=is_mine)
            tl.store(fields + j * PIECE_FIELDS + 7, y_column, mask=is_mine)
        pieces_here = (row_units + step - 1) // step
        fields += tl.where(is_present | is_whole, pieces_here * PIECE_FIELDS, 0)
        y_column += tl.where(is_present, a_rows, 0)

    if planner == 0:
        tl.store(count_ptr + group * 2, tl.sum(pieces, 0))
        tl.store(count_ptr + group * 2 + 1, tl.sum(units, 0))


def plan_lora(slot_T: torch.Tensor, tables: AdapterTables, work: LoraWork) -> None:
    """Plan `work` for rows with the slots `slot_T` (int32), -1 where a row uses the base model."""
    num_rows = slot_T.shape[0]
    if num_rows > work.max_rows:
        raise ValueError(f"{num_rows} rows exceed the {work.max_rows} of the work list")
    block_t = triton.next_power_of_2(max(num_rows, 16))
    _plan_kernel[(PLANNERS, len(GROUPS))](
        slot_T,
        tables.rank_S,
        tables.a_offset_SX,
        tables.b_offset_SX,
        work.row_units_X,
        work.shrink_GN8,
        work.expand_GN8,
        work.count_G2,
        num_rows,
        work.shrink_GN8.shape[1],
        work.expand_GN8.shape[1],
        MODULES=len(MODULES),
        FIRST_MODULE=FIRST_MODULE,
        GROUP_MODULES=tuple(len(group) for group in GROUPS),
        WAYS=work.ways_G,
        WHOLE_GROUP=QKV if work.rotates else NO_GROUP,
        TILE_ROWS=work.setting.tile_rows,
        SHRINK_RANKS=work.setting.shrink_ranks,
        VECTOR_UNITS=work.setting.vector_units,
        PLANNERS=PLANNERS,
        BLOCK_T=block_t,
        num_warps=16 if block_t > ROWS_OF_8_WARPS else 8,
        launch_pdl=has_dependent_launch(slot_T.device),
    )
