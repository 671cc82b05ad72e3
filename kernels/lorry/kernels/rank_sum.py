"""The sum of a step's rows over tensor-parallel GPUs, the residual and the norm, in one kernel.

Every rank has room for rows that all others read. A program copies its rows there, tells the same
program of each other rank that it has come, waits until all have come, and then reads all ranks'
rows, in the order of ranks, so that every rank has the same bits. Nobody waits until rows have been
read: sums take one of two rooms in turn, and a rank that takes a room again has waited in between
for all others' next sum, which none begins before it is through with the last one.

What has been arrived at is counted and never reset, so a CUDA graph may hold any number of sums. A
program waits only for its own number, and all programs of a launch are on the multiprocessors at
once: no rank waits for a program that could not start.

Shape suffixes: T = rows of the step, H = hidden size, C = rows that a room has, R = ranks,
P = programs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.norm import rms_norm_reference

ROOMS = 2
PROGRAMS = 128  # at most, all of which are on any GPU of a data center at once
WARPS = 8


@dataclass(frozen=True, slots=True)
class Rooms:
    """What one of the ranks sees of all ranks' memory; zeros at first."""

    rank: int
    rows: tuple[tuple[torch.Tensor, ...], ...]  # [ROOMS][R] of [C, H]
    arrivals: tuple[torch.Tensor, ...]  # [R] of [R, P], int64: sums that each rank has come to
    passed_P: torch.Tensor  # int64: sums that this rank is through with

    @property
    def capacity(self) -> int:
        """Rows of a step at most."""
        return self.rows[0][0].shape[0]


def sum_add_rms_norm_reference(
    parts_RTH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the parts' sum and the residual, and the sum, which is rounded once."""
    total_TH = (parts_RTH.float().sum(dim=0) + residual_TH.float()).to(residual_TH.dtype)
    return rms_norm_reference(total_TH, weight_H, eps), total_TH


@triton.jit
def _meet(arrivals, passed_ptr, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Return once this program of every rank has come; what they wrote before is seen then."""
    program = tl.program_id(0)
    number = tl.load(passed_ptr + program) + 1
    tl.debug_barrier()  # all threads have written, so the first one's release covers it
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            come = arrivals[rank] + RANK * PROGRAMS + program
            tl.atomic_add(come, 1, sem="release", scope="sys")
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            come = arrivals[RANK] + rank * PROGRAMS + program
            while tl.atomic_add(come, 0, sem="acquire", scope="sys") < number:
                pass
    tl.store(passed_ptr + program, number)


@triton.jit
def _rank_sum_kernel(
    x_ptr,  # [T, H], this rank's part; replaced by the norm
    rows,  # [R] of [C, H]
    arrivals,  # [R] of [R, P]
    passed_ptr,  # [P]
    residual_ptr,  # [T, H], read and replaced by the sum
    weight_ptr,  # [H]
    num_rows,
    hidden,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Each program takes every so many rows."""
    wait_for_kernels_before()
    first, step = tl.program_id(0), tl.num_programs(0)
    h = tl.arange(0, BLOCK_H)
    in_row = h < hidden
    for row in range(first, num_rows, step):
        at = row * hidden + h
        tl.store(rows[RANK] + at, tl.load(x_ptr + at, mask=in_row), mask=in_row)
    weight = tl.load(weight_ptr + h, mask=in_row, other=0.0).to(tl.float32)
    _meet(arrivals, passed_ptr, RANK, RANKS, PROGRAMS)
    for row in range(first, num_rows, step):
        at = row * hidden + h
        residual = tl.load(residual_ptr + at, mask=in_row, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        for rank in tl.static_range(RANKS):
            # Others' rows change: the first cache knows nothing of that.
            part = tl.load(rows[rank] + at, mask=in_row, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        x = (total + residual).to(x_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, x, mask=in_row)
        exact = x.to(tl.float32)
        mean = tl.sum(exact * exact, 0) / hidden
        normed = (exact * tl.rsqrt(mean + eps)).to(x.dtype).to(tl.float32)
        tl.store(x_ptr + at, (weight * normed).to(x.dtype), mask=in_row)


def sum_add_rms_norm(
    x_TH: torch.Tensor,
    rooms: Rooms,
    room: int,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
) -> None:
    """Add the ranks' `x_TH` to `residual_TH` in place and put the sum's norm in `x_TH`'s place.

    All ranks must launch the same sums in the same order, and take the rooms in turn. Both tensors
    are contiguous and have at most `rooms.capacity` rows; bf16, fp16 or fp32.
    """
    num_rows, hidden = x_TH.shape
    rows = rooms.rows[room]
    _rank_sum_kernel[(min(num_rows, PROGRAMS),)](
        x_TH,
        rows,
        rooms.arrivals,
        rooms.passed_P,
        residual_TH,
        weight_H,
        num_rows,
        hidden,
        eps,
        RANK=rooms.rank,
        RANKS=len(rows),
        PROGRAMS=PROGRAMS,
        BLOCK_H=triton.next_power_of_2(hidden),
        num_warps=WARPS,
        launch_pdl=has_dependent_launch(x_TH.device),
    )
