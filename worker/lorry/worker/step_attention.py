"""A step's attention on a GPU: balanced over the multiprocessors, or batch-invariant.

Shape suffixes: T = rows of the step, R = rows of the sequence table, P = pages of a sequence,
Q = query heads, D = head dimension.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from lorry.kernels.attention_plan import (
    AttentionSetting,
    AttentionWork,
    allocate_attention_work,
    plan_attention,
)
from lorry.kernels.invariant_attention import split_attention
from lorry.kernels.launch_settings import (
    SMALL_ROWS,
    decode_setting,
    prefill_setting,
    small_setting,
    split_setting,
)
from lorry.kernels.paged_attention import paged_attention
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.kernels.small_attention import small_attention
from lorry.kernels.small_parts import SmallWork, allocate_small_work
from lorry.kernels.split_plan import SplitWork, allocate_partials, allocate_split_work, plan_splits
from lorry.worker.side_stream import SideStream


class AttendedRows(NamedTuple):
    """The sequence of each row of a step, and its position in it."""

    sequence_T: torch.Tensor
    position_T: torch.Tensor


class CachedSequences(NamedTuple):
    """Where the KV of sequences lies."""

    pool: PoolView
    block_table_RP: torch.Tensor


class StepAttention(Protocol):
    """For the layers of one window, a step at a time."""

    def plan(self, rows: AttendedRows) -> None: ...

    def attend(
        self, q_TQD: torch.Tensor, layer: int, rows: AttendedRows, out_TQD: torch.Tensor
    ) -> None:
        """Of the rows that were planned."""
        ...


@dataclass(frozen=True, slots=True)
class BalancedAttention:
    """A form for the rows that decode and one for those of prompts, side by side."""

    cached: CachedSequences
    decode: AttentionWork
    prefill: AttentionWork
    side: SideStream

    def plan(self, rows: AttendedRows) -> None:
        plan_attention(*rows, self.decode, max_run=1)
        plan_attention(*rows, self.prefill, min_run=2)

    def attend(
        self, q_TQD: torch.Tensor, layer: int, rows: AttendedRows, out_TQD: torch.Tensor
    ) -> None:
        pool, table_RP = self.cached
        self.side.fork()
        with self.side.launches():
            paged_attention(q_TQD, pool, layer, table_RP, self.prefill, out_TQD)
        paged_attention(q_TQD, pool, layer, table_RP, self.decode, out_TQD)
        self.side.join()


@dataclass(frozen=True, slots=True)
class SmallAttention:
    """For steps of few rows, whatever these are."""

    cached: CachedSequences
    work: SmallWork

    def plan(self, rows: AttendedRows) -> None:
        pass  # each program finds its part by itself

    def attend(
        self, q_TQD: torch.Tensor, layer: int, rows: AttendedRows, out_TQD: torch.Tensor
    ) -> None:
        pool, table_RP = self.cached
        small_attention(q_TQD, pool, layer, table_RP, *rows, self.work, out_TQD)


@dataclass(frozen=True, slots=True)
class AttentionBySize:
    """Chosen by a step's rows, of which there are as many whenever its graph is replayed."""

    small: SmallAttention
    large: BalancedAttention

    def plan(self, rows: AttendedRows) -> None:
        self._of(rows).plan(rows)

    def attend(
        self, q_TQD: torch.Tensor, layer: int, rows: AttendedRows, out_TQD: torch.Tensor
    ) -> None:
        self._of(rows).attend(q_TQD, layer, rows, out_TQD)

    def _of(self, rows: AttendedRows) -> StepAttention:
        is_small = len(rows.sequence_T) <= self.small.work.max_rows
        return self.small if is_small else self.large


@dataclass(frozen=True, slots=True)
class InvariantAttention:
    """One form for all rows."""

    cached: CachedSequences
    work: SplitWork

    def plan(self, rows: AttendedRows) -> None:
        plan_splits(*rows, self.work)

    def attend(
        self, q_TQD: torch.Tensor, layer: int, rows: AttendedRows, out_TQD: torch.Tensor
    ) -> None:
        pool, table_RP = self.cached
        split_attention(q_TQD, pool, layer, table_RP, *rows, self.work, out_TQD)


def balanced_attention(
    cached: CachedSequences, windows: Iterable[int | None], side: SideStream, *, max_rows: int
) -> Mapping[int | None, StepAttention]:
    """By window, for steps of up to `max_rows` rows."""
    geometry = cached.pool.layout.local_geometry
    dtype, group = TORCH_DTYPES[cached.pool.layout.dtype], geometry.heads // geometry.kv_heads
    shape = {
        "heads": geometry.heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
    }
    device = cached.pool.slices.device

    def work(setting: AttentionSetting, window: int | None) -> AttentionWork:
        return allocate_attention_work(
            setting, max_rows=max_rows, device=device, window=window, **shape
        )

    def small(window: int | None) -> SmallWork:
        return allocate_small_work(
            small_setting(dtype, group), max_rows=SMALL_ROWS, device=device, window=window, **shape
        )

    return {
        window: AttentionBySize(
            small=SmallAttention(cached, small(window)),
            large=BalancedAttention(
                cached,
                decode=work(decode_setting(dtype, group), window),
                prefill=work(prefill_setting(dtype, group), window),
                side=side,
            ),
        )
        for window in dict.fromkeys(windows)
    }


def invariant_attention(
    cached: CachedSequences, windows: Iterable[int | None], *, max_rows: int
) -> Mapping[int | None, StepAttention]:
    """By window, for steps of up to `max_rows` rows."""
    layout = cached.pool.layout
    geometry = layout.local_geometry
    setting = split_setting(TORCH_DTYPES[layout.dtype], geometry.heads // geometry.kv_heads)
    partials = allocate_partials(
        setting,
        max_rows=max_rows,
        heads=geometry.heads,
        head_dim=geometry.head_dim,
        device=cached.pool.slices.device,
    )
    return {
        window: InvariantAttention(
            cached,
            allocate_split_work(setting, partials, kv_heads=geometry.kv_heads, window=window),
        )
        for window in dict.fromkeys(windows)
    }
