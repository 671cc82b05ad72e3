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
from lorry.kernels.launch_settings import decode_setting, prefill_setting, split_setting
from lorry.kernels.paged_attention import paged_attention
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
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
        with self.side.forked():
            paged_attention(q_TQD, pool, layer, table_RP, self.prefill, out_TQD)
        paged_attention(q_TQD, pool, layer, table_RP, self.decode, out_TQD)
        self.side.join()


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
    layout = cached.pool.layout
    geometry = layout.local_geometry
    dtype, group = TORCH_DTYPES[layout.dtype], geometry.heads // geometry.kv_heads

    def work(setting: AttentionSetting, window: int | None) -> AttentionWork:
        return allocate_attention_work(
            setting,
            max_rows=max_rows,
            heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            device=cached.pool.slices.device,
            window=window,
        )

    return {
        window: BalancedAttention(
            cached,
            decode=work(decode_setting(dtype, group), window),
            prefill=work(prefill_setting(dtype, group), window),
            side=side,
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
