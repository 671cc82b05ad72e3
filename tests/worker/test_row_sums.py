"""Which way a layer's rows are summed over ranks, and where each sum has its rows."""

from collections.abc import Sequence
from typing import cast

import pytest
import torch

from lorry.kernels.page_layout import Dtype, ModelGeometry, PageLayout, TpStrategy
from lorry.kernels.rank_sum import ROOMS, sum_add_rms_norm_reference
from lorry.worker.collectives import Alone
from lorry.worker.one_shot import MAX_BYTES
from lorry.worker.operations import Operations
from lorry.worker.row_sums import FusedSums, NoSums, Rows, row_sums
from tests.kernels.test_rank_sum import CAPACITY, EPS, Ranks, parts_of

HIDDEN = 16
OPERATIONS = cast(Operations, None)  # one kernel needs none


class Sharing:
    """A rank that shares memory, see `Collectives`; notes how much."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self.num_bytes = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("summed by a collective")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("gathered")

    def share(self, num_bytes: int) -> Sequence[torch.Tensor]:
        self.num_bytes = num_bytes
        return [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(self._ranks)]


class Larger:
    """Sums of more rows than there is room for."""

    def __init__(self) -> None:
        self.rows = list[int]()

    def add_rms_norm(
        self,
        rows: Rows,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        operations: Operations,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows.append(len(residual_TH))
        return residual_TH, residual_TH


def layout_of(ranks: int, hidden: int) -> PageLayout:
    geometry = ModelGeometry(
        layers=1, hidden=hidden, heads=8, kv_heads=8, head_dim=16, intermediate=64
    )
    strategy = TpStrategy.REPLICATED if ranks > 1 else None
    return PageLayout(geometry=geometry, dtype=Dtype.BF16, tp_size=ranks, tp_strategy=strategy)


def computing(rows_TH: torch.Tensor) -> Rows:
    """What is a part of a sum, and so may not be added to anything."""

    def rows(onto_TH: torch.Tensor | None) -> torch.Tensor:
        assert onto_TH is None
        return rows_TH

    return rows


def test_a_rank_alone_sums_nothing() -> None:
    sums = row_sums(Alone(), layout_of(1, HIDDEN), max_rows=8, norm_epsilon=EPS)
    assert isinstance(sums, NoSums)


@pytest.mark.parametrize(("ranks", "is_whole"), [(2, True), (4, False)])
def test_more_than_two_ranks_share_only_what_one_kernel_sums_faster(
    ranks: int, is_whole: bool
) -> None:
    hidden, max_rows = 4096, 2048
    collectives, row_bytes = Sharing(ranks), hidden * 2
    sums = row_sums(collectives, layout_of(ranks, hidden), max_rows=max_rows, norm_epsilon=EPS)
    assert isinstance(sums, FusedSums)
    most = max_rows * row_bytes if is_whole else MAX_BYTES
    assert 0 < collectives.num_bytes - ROOMS * most < MAX_BYTES // 16


def test_sums_take_the_rooms_in_turn() -> None:
    ranks, weight_H = Ranks(2, HIDDEN, torch.float32, "cpu"), torch.ones(HIDDEN)
    sums = FusedSums(ranks.rooms[0], Larger(), EPS)
    for number in range(2 * ROOMS):
        parts_RTH = parts_of(2, 3, HIDDEN, torch.float32, number)
        ranks.let_others_come(0, number % ROOMS, parts_RTH)
        residual_TH = torch.full((3, HIDDEN), float(number))
        expected = sum_add_rms_norm_reference(parts_RTH, residual_TH, weight_H, EPS)
        rows = computing(parts_RTH[0].clone())
        found = sums.add_rms_norm(rows, residual_TH, weight_H, OPERATIONS)
        torch.testing.assert_close(found, expected)


def test_more_rows_than_there_is_room_for_are_summed_otherwise() -> None:
    ranks, larger = Ranks(2, HIDDEN, torch.float32, "cpu"), Larger()
    sums = FusedSums(ranks.rooms[0], larger, EPS)
    x_TH = torch.zeros(CAPACITY + 1, HIDDEN)
    sums.add_rms_norm(computing(x_TH), x_TH, torch.ones(HIDDEN), OPERATIONS)
    assert larger.rows == [CAPACITY + 1]
    assert not ranks.rooms[0].passed_P.any()
