"""Which sums are one-shot, and that all ranks choose alike."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._C._distributed_c10d import HashStore, _resolve_process_group

from lorry.worker import one_shot
from lorry.worker.collectives import Collectives, Group, join_by_gloo
from lorry.worker.one_shot import OneShot, PeerMemory, named_group, with_one_shot

CPU = torch.device("cpu")
SIZE = 2


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.empty(1, 8, dtype=torch.bfloat16), True),
        (torch.empty(one_shot.MAX_BYTES // 4), True),
        (torch.empty(one_shot.MAX_BYTES // 4 + 4), False),
        (torch.empty(3), False),
        (torch.empty(0), False),
        (torch.empty(8, dtype=torch.float64), False),
        (torch.empty(8, dtype=torch.int32), False),
    ],
)
def test_small_sums_of_what_the_kernel_adds_are_one_shot(x: torch.Tensor, expected: bool) -> None:
    assert one_shot.is_small(x) is expected


class Peers:
    """See `PeerMemory`; threads share what they have anyway."""

    def __init__(self, group: Group) -> None:
        self.sum = group.all_reduce

    def share(self, num_bytes: int) -> Sequence[torch.Tensor]:
        return [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(SIZE)]


def join(can_open: list[bool], can: list[bool]) -> list[Collectives]:
    """What each rank has, whose opening of its memory may raise."""
    store = HashStore()

    def of_rank(rank: int) -> Collectives:
        group = join_by_gloo(store, rank=rank, size=SIZE)

        def open_peers() -> PeerMemory:
            if not can_open[rank]:
                raise RuntimeError("no peer access")
            return Peers(group)

        return with_one_shot(group, open_peers, CPU, can=can[rank])

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(of_rank, range(SIZE)))


@pytest.mark.parametrize("rank", range(SIZE))
def test_no_rank_is_one_shot_if_one_cannot(rank: int) -> None:
    some = [other != rank for other in range(SIZE)]
    assert all(isinstance(one, Group) for one in join(some, [True] * SIZE))
    assert all(isinstance(one, Group) for one in join([True] * SIZE, some))


def test_all_ranks_are_one_shot_if_all_can() -> None:
    assert all(isinstance(one, OneShot) for one in join([True] * SIZE, [True] * SIZE))


def test_one_shot_ranks_share_memory_and_others_do_not() -> None:
    for one in join([True] * SIZE, [True] * SIZE):
        assert [len(of_rank) for of_rank in one.share(100) or ()] == [100, 100]
    for one in join([False] * SIZE, [True] * SIZE):
        assert one.share(100) is None


def test_torch_finds_the_group_by_its_name() -> None:
    store = HashStore()
    group = join_by_gloo(store, rank=0, size=1)
    named = named_group(group.backend, store, rank=0, size=1, device=CPU)
    found = _resolve_process_group(one_shot.GROUP)
    assert (found.rank(), found.size(), found.group_name) == (0, 1, one_shot.GROUP)
    assert named.size() == 1
