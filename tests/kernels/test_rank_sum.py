"""The sum of rows over ranks, whose programs run one after the other here."""

import pytest
import torch

from lorry.kernels.rank_sum import (
    PROGRAMS,
    ROOMS,
    Rooms,
    sum_add_rms_norm,
    sum_add_rms_norm_reference,
)
from lorry.worker.row_sums import open_rooms, rooms_bytes

EPS = 1e-5
CAPACITY = PROGRAMS + 5
UNSET = -7.0
# The interpreter cuts off what does not fit into bf16.
RELATIVE = {torch.bfloat16: 2**-5, torch.float32: 1e-5}
ABSOLUTE = {torch.bfloat16: 1e-3, torch.float32: 1e-6}


class Ranks:
    """All ranks of one process, which see the same memory."""

    def __init__(self, size: int, hidden: int, dtype: torch.dtype, device: str) -> None:
        num_bytes = rooms_bytes(size, CAPACITY, hidden, dtype)
        memory = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(size)]
        self.rooms = [open_rooms(memory, rank, CAPACITY, hidden, dtype) for rank in range(size)]

    def let_others_come(self, rank: int, room: int, parts_RTH: torch.Tensor) -> None:
        """Leave what the other ranks would before `rank`, which then need not wait."""
        rooms = self.rooms[rank]
        for other in range(len(self.rooms)):
            if other != rank:
                rooms.rows[room][other][: parts_RTH.shape[1]] = parts_RTH[other]
                rooms.arrivals[rank][other] = rooms.passed_P + 1


def parts_of(size: int, rows: int, hidden: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(size, rows, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("size", "rows", "hidden", "dtype"),
    [
        (2, 1, 64, torch.float32),
        (2, 5, 48, torch.bfloat16),
        (3, 4, 300, torch.float32),
        (2, CAPACITY, 16, torch.float32),
    ],
)
def test_ranks_have_the_norm_of_their_sum(
    size: int, rows: int, hidden: int, dtype: torch.dtype
) -> None:
    ranks = Ranks(size, hidden, dtype, "cpu")
    weight_H = parts_of(1, 1, hidden, dtype, 1)[0, 0]
    for number in range(2 * ROOMS):
        parts_RTH = parts_of(size, rows, hidden, dtype, 2 + number)
        residual_TH = parts_of(1, rows, hidden, dtype, 20 + number)[0]
        normed_TH, total_TH = sum_add_rms_norm_reference(parts_RTH, residual_TH, weight_H, EPS)
        found = []
        for rank in range(size):
            x_TH, own_TH = parts_RTH[rank].clone(), residual_TH.clone()
            ranks.let_others_come(rank, number % ROOMS, parts_RTH)
            sum_add_rms_norm(x_TH, ranks.rooms[rank], number % ROOMS, own_TH, weight_H, EPS)
            found.append((x_TH, own_TH))
        for x_TH, own_TH in found:
            assert torch.equal(x_TH, found[0][0])
            assert torch.equal(own_TH, found[0][1])
            for actual, expected in ((own_TH, total_TH), (x_TH, normed_TH)):
                torch.testing.assert_close(
                    actual, expected, rtol=RELATIVE[dtype], atol=ABSOLUTE[dtype]
                )


def programs_come(rooms: Rooms, rank: int) -> torch.Tensor:
    """How often programs of this rank have told another one that they are there."""
    return rooms.arrivals[1 - rank][rank]


@pytest.mark.parametrize("rows", [1, 3, PROGRAMS + 2])
def test_a_program_tells_the_others_once_after_its_rows_are_there(rows: int) -> None:
    ranks = Ranks(2, 32, torch.float32, "cpu")
    parts_RTH = parts_of(2, rows, 32, torch.float32, 3)
    for of_rank in ranks.rooms[0].rows[1]:
        of_rank.fill_(UNSET)
    ranks.let_others_come(0, 1, parts_RTH)
    x_TH = parts_RTH[0].clone()
    sum_add_rms_norm(x_TH, ranks.rooms[0], 1, torch.zeros(rows, 32), torch.ones(32), EPS)
    assert torch.equal(ranks.rooms[1].rows[1][0][:rows], parts_RTH[0])
    assert (ranks.rooms[1].rows[1][0][rows:] == UNSET).all()
    assert not ranks.rooms[1].rows[0][0].any()
    expected = (torch.arange(PROGRAMS) < rows).long()
    assert torch.equal(programs_come(ranks.rooms[0], 0), expected)
    assert torch.equal(ranks.rooms[0].passed_P, expected)


def test_steps_of_different_sizes_follow_each_other() -> None:
    ranks = Ranks(2, 16, torch.float32, "cpu")
    weight_H = torch.ones(16)
    for number, rows in enumerate([3, CAPACITY, 1, 2, PROGRAMS, 5]):
        parts_RTH = parts_of(2, rows, 16, torch.float32, number)
        residual_TH = torch.zeros(rows, 16)
        x_TH = parts_RTH[1].clone()
        ranks.let_others_come(1, number % ROOMS, parts_RTH)
        sum_add_rms_norm(x_TH, ranks.rooms[1], number % ROOMS, residual_TH, weight_H, EPS)
        torch.testing.assert_close(residual_TH, parts_RTH.sum(dim=0))
    assert programs_come(ranks.rooms[1], 1)[0] == 6
    assert programs_come(ranks.rooms[1], 1)[PROGRAMS - 1] == 2
