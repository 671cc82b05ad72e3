"""The work list of paged attention, planned on the device once per step.

Rows of a step that share a sequence and follow each other form a run. Runs are cut into tiles of at
most `tile_rows` rows; a tile with one KV head is a unit, and a unit reads its cached tokens in
blocks, where a window is given only those that hold a token of it. A unit costs its blocks and
what starting it takes. All costs of a step, in the order (tile,
KV head, block), are dealt to a fixed number of programs in equal, consecutive shares, so that
ragged lengths leave no program idle. A unit that a share boundary cuts is summed from partial
results.

Shape suffixes: T = rows of the step, N = tiles, P = programs.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.device import multiprocessors
from lorry.kernels.runs import run_bounds

TILE_FIELDS = tl.constexpr(8)  # first row, rows, sequence, position, cost before it, blocks
PROGRAM_FIELDS = tl.constexpr(4)  # tile, KV head, cost before it in the unit, cost of the share
PROGRAMS_PER_PLANNER = 64
PLANNED_LANES = 8192  # programs times rows that one planner compares at once


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSetting:
    """Launch setting of the attention kernel; `block_rows` counts (row, query head) pairs."""

    block_rows: int
    block_tokens: int
    programs_per_multiprocessor: int
    unit_cost: int  # of starting a unit, in blocks
    min_share: int  # cost of a program's share, so that a merge never reads too many partials
    num_warps: int
    num_stages: int
    registers: int | None = None  # of a thread at most, so that all programs run at once


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Device memory of a plan and of its partial results; for one launch at a time."""

    setting: AttentionSetting
    kv_heads: int
    group: int
    window: int | None  # how many positions a row attends to, its own included; None is all
    tile_N8: torch.Tensor  # int32
    program_P4: torch.Tensor  # int32
    share_1: torch.Tensor  # int32, cost of a full share
    partial_o: torch.Tensor  # float32, [2 * programs, block rows, head dim]
    partial_ml: torch.Tensor  # float32, [2 * programs, 2, block rows]: maximum and sum
    arrived_P: torch.Tensor  # int32, zero between launches

    @property
    def num_programs(self) -> int:
        return self.program_P4.shape[0]

    @property
    def tile_rows(self) -> int:
        return self.setting.block_rows // self.group


def allocate_attention_work(
    setting: AttentionSetting,
    *,
    max_rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    window: int | None = None,
) -> AttentionWork:
    """Memory for plans of up to `max_rows` rows."""
    group = heads // kv_heads
    if setting.block_rows < group:
        raise ValueError(f"block_rows {setting.block_rows} is below the {group} heads of a group")
    programs = multiprocessors(device) * setting.programs_per_multiprocessor
    zeros = partial(torch.zeros, dtype=torch.int32, device=device)
    empty = partial(torch.empty, dtype=torch.float32, device=device)
    return AttentionWork(
        setting=setting,
        kv_heads=kv_heads,
        group=group,
        window=window,
        tile_N8=zeros(max_rows, TILE_FIELDS.value),
        program_P4=zeros(programs, PROGRAM_FIELDS.value),
        share_1=zeros(1),
        partial_o=empty(2 * programs, setting.block_rows, head_dim),
        partial_ml=empty(2 * programs, 2, setting.block_rows),
        arrived_P=zeros(programs),
    )


@triton.jit
def first_block_of(position, WINDOW: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """The first block that a row at `position` attends to, or a later row of its tile."""
    return tl.maximum(position - (WINDOW - 1), 0) // BLOCK_TOKENS


@triton.jit
def _plan_kernel(
    sequence_ptr,  # [T]
    position_ptr,  # [T]
    tile_ptr,  # [N, 8]
    program_ptr,  # [P, 4]
    share_ptr,  # [1]
    num_rows,
    num_programs,
    min_run,
    max_run,
    TILE_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 is none
    BLOCK_TOKENS: tl.constexpr,
    UNIT_COST: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PROGRAMS_AT_ONCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Every planner cuts all tiles; the first stores them, each stores its programs' shares."""
    wait_for_kernels_before()
    t = tl.arange(0, BLOCK_T)
    sequence = tl.load(sequence_ptr + t, mask=t < num_rows, other=-1)
    position = tl.load(position_ptr + t, mask=t < num_rows, other=0)
    first, end = run_bounds(sequence, sequence_ptr, t, num_rows, BLOCK_T)
    run = end - first
    is_tile = (sequence >= 0) & (run >= min_run) & (run <= max_run) & ((t - first) % TILE_ROWS == 0)
    rows = tl.minimum(end - t, TILE_ROWS)
    blocks = (position + rows + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    if WINDOW:
        blocks -= first_block_of(position, WINDOW, BLOCK_TOKENS)
    cost = tl.where(is_tile, blocks + UNIT_COST, 0)
    tile = tl.cumsum(is_tile.to(tl.int32), 0) - 1
    through = tl.cumsum(cost, 0) * KV_HEADS
    total = tl.sum(cost, 0) * KV_HEADS
    share = tl.maximum((total + num_programs - 1) // num_programs, MIN_SHARE)

    if tl.program_id(0) == 0:
        fields = tile_ptr + tile * TILE_FIELDS
        tl.store(fields, t, mask=is_tile)
        tl.store(fields + 1, rows, mask=is_tile)
        tl.store(fields + 2, sequence, mask=is_tile)
        tl.store(fields + 3, position, mask=is_tile)
        tl.store(fields + 4, through - cost * KV_HEADS, mask=is_tile)
        tl.store(fields + 5, blocks, mask=is_tile)
        tl.store(share_ptr, share)

    for offset in range(0, PROGRAMS, PROGRAMS_AT_ONCE):
        program = tl.program_id(0) * PROGRAMS + offset + tl.arange(0, PROGRAMS_AT_ONCE)
        start = program * share
        is_before = is_tile[None, :] & (through[None, :] <= start[:, None])
        first_tile = tl.sum(is_before.to(tl.int32), 1)
        cost_before = tl.sum(tl.where(is_before, cost[None, :], 0), 1) * KV_HEADS
        is_first = is_tile[None, :] & (tile[None, :] == first_tile[:, None])
        unit_cost = tl.maximum(tl.sum(tl.where(is_first, cost[None, :], 0), 1), 1)
        count = tl.maximum(tl.minimum(total - start, share), 0)
        fields = program_ptr + program * PROGRAM_FIELDS
        is_mine = program < num_programs
        tl.store(fields, first_tile, mask=is_mine)
        tl.store(fields + 1, (start - cost_before) // unit_cost, mask=is_mine)
        tl.store(fields + 2, (start - cost_before) % unit_cost, mask=is_mine)
        tl.store(fields + 3, count, mask=is_mine)


def plan_attention(
    sequence_T: torch.Tensor,
    position_T: torch.Tensor,
    work: AttentionWork,
    *,
    min_run: int = 1,
    max_run: int = 1 << 30,
) -> None:
    """Plan `work` for the runs of `min_run` to `max_run` rows.

    `sequence_T` (int32) names each row's line of the block table, -1 for padding; rows of a
    sequence follow each other in the order of their positions.
    """
    num_rows = sequence_T.shape[0]
    if num_rows > work.tile_N8.shape[0]:
        raise ValueError(f"{num_rows} rows exceed the {work.tile_N8.shape[0]} of the work list")
    block_t = triton.next_power_of_2(max(num_rows, 16))
    _plan_kernel[(triton.cdiv(work.num_programs, PROGRAMS_PER_PLANNER),)](
        sequence_T,
        position_T,
        work.tile_N8,
        work.program_P4,
        work.share_1,
        num_rows,
        work.num_programs,
        min_run,
        max_run,
        TILE_ROWS=work.tile_rows,
        KV_HEADS=work.kv_heads,
        WINDOW=work.window or 0,
        BLOCK_TOKENS=work.setting.block_tokens,
        UNIT_COST=work.setting.unit_cost,
        MIN_SHARE=work.setting.min_share,
        PROGRAMS=PROGRAMS_PER_PLANNER,
        PROGRAMS_AT_ONCE=min(PROGRAMS_PER_PLANNER, max(1, PLANNED_LANES // block_t)),
        BLOCK_T=block_t,
        num_warps=8,
        launch_pdl=has_dependent_launch(sequence_T.device),
    )
