"""The work list of batch-invariant attention, planned on the device once per step.

The tokens of a sequence are cut into splits of a fixed length, from its first token on, and the
splits are dealt in turn to a fixed number of ways. A way sums its splits in their order; the ways
are merged in theirs. So how a row is summed follows from its position: not from how many programs
there are, nor from what else the step computes, nor from where its prompt was cut.

Shape suffixes: T = rows of the step, N = tiles, Q = query heads, W = ways, D = head dimension.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.runs import run_bounds

TILE_FIELDS = tl.constexpr(4)  # first row, rows, sequence, position


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSetting:
    """Launch setting; all but the last three decide how a row is summed."""

    block_rows: int  # (row, query head) pairs
    block_tokens: int
    split_blocks: int
    ways: int
    programs_per_multiprocessor: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Partials:
    """Device memory of what the ways of a step's rows sum; for one launch at a time."""

    o_TQWD: torch.Tensor  # float32
    ml_TQW2: torch.Tensor  # float32: maximum and sum


@dataclass(frozen=True, slots=True)
class SplitWork:
    """Device memory of a plan."""

    setting: SplitSetting
    kv_heads: int
    window: int | None  # how many positions a row attends to, its own included; None is all
    tile_N4: torch.Tensor  # int32
    count_2: torch.Tensor  # int32: tiles, and ways of the longest
    partials: Partials

    @property
    def group(self) -> int:
        return self.partials.o_TQWD.shape[1] // self.kv_heads

    @property
    def tile_rows(self) -> int:
        return self.setting.block_rows // self.group


def partials_bytes(setting: SplitSetting, *, max_rows: int, heads: int, head_dim: int) -> int:
    """What `allocate_partials` takes."""
    return max_rows * heads * setting.ways * (head_dim + 2) * torch.float32.itemsize


def allocate_partials(
    setting: SplitSetting, *, max_rows: int, heads: int, head_dim: int, device: torch.device
) -> Partials:
    """For steps of up to `max_rows` rows."""
    empty = partial(torch.empty, max_rows, heads, setting.ways, dtype=torch.float32, device=device)
    return Partials(empty(head_dim), empty(2))


def allocate_split_work(
    setting: SplitSetting, partials: Partials, *, kv_heads: int, window: int | None = None
) -> SplitWork:
    """Memory for plans of as many rows as `partials` has; works of a model may share them."""
    max_rows, heads, _, _ = partials.o_TQWD.shape
    if setting.block_rows < heads // kv_heads:
        raise ValueError(
            f"block_rows {setting.block_rows} is below the {heads // kv_heads} heads of a group"
        )
    zeros = partial(torch.zeros, dtype=torch.int32, device=partials.o_TQWD.device)
    return SplitWork(
        setting=setting,
        kv_heads=kv_heads,
        window=window,
        tile_N4=zeros(max_rows, TILE_FIELDS.value),
        count_2=zeros(2),
        partials=partials,
    )


@triton.jit
def ways_of(num_tokens, BLOCK_TOKENS: tl.constexpr, SPLIT_BLOCKS: tl.constexpr, WAYS: tl.constexpr):
    """How many ways have one of the first `num_tokens` tokens of a sequence."""
    splits = (num_tokens + BLOCK_TOKENS * SPLIT_BLOCKS - 1) // (BLOCK_TOKENS * SPLIT_BLOCKS)
    return tl.minimum(splits, WAYS)


@triton.jit
def _plan_kernel(
    sequence_ptr,  # [T]
    position_ptr,  # [T]
    tile_ptr,  # [N, 4]
    count_ptr,  # [2]
    num_rows,
    TILE_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program cuts the runs of rows that share a sequence into tiles."""
    wait_for_kernels_before()
    t = tl.arange(0, BLOCK_T)
    sequence = tl.load(sequence_ptr + t, mask=t < num_rows, other=-1)
    position = tl.load(position_ptr + t, mask=t < num_rows, other=0)
    first, end = run_bounds(sequence, sequence_ptr, t, num_rows, BLOCK_T)
    is_tile = (sequence >= 0) & ((t - first) % TILE_ROWS == 0)
    rows = tl.minimum(end - t, TILE_ROWS)
    fields = tile_ptr + (tl.cumsum(is_tile.to(tl.int32), 0) - 1) * TILE_FIELDS
    tl.store(fields, t, mask=is_tile)
    tl.store(fields + 1, rows, mask=is_tile)
    tl.store(fields + 2, sequence, mask=is_tile)
    tl.store(fields + 3, position, mask=is_tile)
    ways = ways_of(position + rows, BLOCK_TOKENS, SPLIT_BLOCKS, WAYS)
    tl.store(count_ptr, tl.sum(is_tile.to(tl.int32), 0))
    tl.store(count_ptr + 1, tl.max(tl.where(is_tile, ways, 0), 0))


def plan_splits(sequence_T: torch.Tensor, position_T: torch.Tensor, work: SplitWork) -> None:
    """Plan `work` for a step; the arguments are those of `plan_attention`."""
    num_rows = sequence_T.shape[0]
    if num_rows > work.tile_N4.shape[0]:
        raise ValueError(f"{num_rows} rows exceed the {work.tile_N4.shape[0]} of the work list")
    _plan_kernel[(1,)](
        sequence_T,
        position_T,
        work.tile_N4,
        work.count_2,
        num_rows,
        TILE_ROWS=work.tile_rows,
        BLOCK_TOKENS=work.setting.block_tokens,
        SPLIT_BLOCKS=work.setting.split_blocks,
        WAYS=work.setting.ways,
        BLOCK_T=triton.next_power_of_2(max(num_rows, 16)),
        num_warps=8,
        launch_pdl=has_dependent_launch(sequence_T.device),
    )
