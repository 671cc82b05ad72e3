"""How a layer's rows are summed over tensor-parallel ranks before the residual and the norm.

Shape suffixes: T = rows of the step, H = hidden size.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from lorry.kernels.page_layout import PageLayout
from lorry.kernels.pool_view import TORCH_DTYPES
from lorry.kernels.rank_sum import PROGRAMS, ROOMS, Rooms, sum_add_rms_norm
from lorry.worker.collectives import Collectives
from lorry.worker.one_shot import MAX_BYTES
from lorry.worker.operations import Operations

COUNT = torch.int64  # of arrivals

log = logging.getLogger(__name__)


class Rows(Protocol):
    """Computes this rank's part of a layer's rows."""

    def __call__(self, onto_TH: torch.Tensor | None, /) -> torch.Tensor:
        """Added to `onto` in place, if that is given."""
        ...


class RowSums(Protocol):
    def add_rms_norm(
        self,
        rows: Rows,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        operations: Operations,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the ranks' sum of `rows` and the residual, and that sum.

        Every rank must call it, and may not use the argument `residual_TH` again.
        """
        ...


def row_sums(
    collectives: Collectives, layout: PageLayout, *, max_rows: int, norm_epsilon: float
) -> RowSums:
    """One kernel for each if the ranks share memory; every rank must call it."""
    if layout.tp_size == 1:
        return NoSums()
    separate = SeparateSums(collectives)
    hidden, dtype = layout.geometry.hidden, TORCH_DTYPES[layout.dtype]
    if layout.tp_size > 2:  # rings move fewer bytes then
        max_rows = min(max_rows, MAX_BYTES // (hidden * dtype.itemsize))
    memory = collectives.share(rooms_bytes(layout.tp_size, max_rows, hidden, dtype))
    if memory is None:
        return separate
    log.info("up to %d rows of a layer are summed and normed in one kernel", max_rows)
    rooms = open_rooms(memory, layout.tp_rank, max_rows, hidden, dtype)
    return FusedSums(rooms, separate, norm_epsilon)


class NoSums:
    """Of a rank that is alone: its products are added to the residual; see `RowSums`."""

    def add_rms_norm(
        self,
        rows: Rows,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        operations: Operations,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual_TH = rows(residual_TH)
        return operations.rms_norm(residual_TH, weight_H), residual_TH


class SeparateSums:
    """A collective, and the norm; see `RowSums`."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def add_rms_norm(
        self,
        rows: Rows,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        operations: Operations,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TH = self._collectives.all_reduce(rows(None))
        return operations.add_rms_norm(x_TH, residual_TH, weight_H)


class FusedSums:
    """One kernel over memory of all ranks, where the rows fit into it; see `RowSums`."""

    def __init__(self, rooms: Rooms, larger: RowSums, norm_epsilon: float) -> None:
        self._rooms, self._larger, self._epsilon = rooms, larger, norm_epsilon
        self._room = 0

    def add_rms_norm(
        self,
        rows: Rows,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        operations: Operations,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(residual_TH) > self._rooms.capacity:
            return self._larger.add_rms_norm(rows, residual_TH, weight_H, operations)
        x_TH = rows(None).contiguous()
        sum_add_rms_norm(x_TH, self._rooms, self._room, residual_TH, weight_H, self._epsilon)
        # A step has two for each layer, so graphs that are replayed in any order keep the turns.
        self._room = (self._room + 1) % ROOMS
        return x_TH, residual_TH


def rooms_bytes(ranks: int, rows: int, hidden: int, dtype: torch.dtype) -> int:
    """Of one rank."""
    return ranks * PROGRAMS * COUNT.itemsize + ROOMS * rows * hidden * dtype.itemsize


def open_rooms(
    memory: Sequence[torch.Tensor], rank: int, rows: int, hidden: int, dtype: torch.dtype
) -> Rooms:
    """Rooms in `rooms_bytes` of zeros of each rank."""
    ranks = len(memory)
    counted = ranks * PROGRAMS * COUNT.itemsize
    arrivals = [of_rank[:counted].view(COUNT).view(ranks, PROGRAMS) for of_rank in memory]
    parts = [of_rank[counted:].view(dtype).view(ROOMS, rows, hidden) for of_rank in memory]
    return Rooms(
        rank=rank,
        rows=tuple(tuple(part[room] for part in parts) for room in range(ROOMS)),
        arrivals=tuple(arrivals),
        passed_P=torch.zeros(PROGRAMS, dtype=COUNT, device=memory[rank].device),
    )
