"""Chunks of uploads take turns while fetches come, by a clock that the tests move."""

from pathlib import Path

import pytest

from lorry.adapter_store.pace import FETCHES_GO_ON_S, MAX_CHUNK_S, SPACING, Pace
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.rpc.errors import VersionNotFound
from tests.support.adapter_store import running_store
from tests.support.adapters import TINY

CHUNK_S = 0.004


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    """Of a store where a fetch has come and a chunk has taken its time."""
    pace = Pace(clock)
    pace.fetched()
    pace.took(CHUNK_S)
    return pace


def waits_s(pace: Pace) -> list[float]:
    """Of three chunks that come at once."""
    return [pace.take_turn() for _ in range(3)]


def test_chunks_need_not_wait_while_nobody_fetches(clock: Clock) -> None:
    pace = Pace(clock)
    pace.took(CHUNK_S)
    assert waits_s(pace) == [0.0, 0.0, 0.0]


def test_chunks_of_all_uploads_are_spaced_while_fetches_come(pace: Pace) -> None:
    assert waits_s(pace) == pytest.approx([0.0, SPACING * CHUNK_S, 2 * SPACING * CHUNK_S])


def test_time_that_no_upload_used_is_not_made_up_for(pace: Pace, clock: Clock) -> None:
    pace.take_turn()
    clock.now_s += 3 * SPACING * CHUNK_S
    assert waits_s(pace)[:2] == pytest.approx([0.0, SPACING * CHUNK_S])


def test_uploads_are_free_again_once_fetches_end(pace: Pace, clock: Clock) -> None:
    waits_s(pace)
    clock.now_s += FETCHES_GO_ON_S + 0.001
    assert waits_s(pace) == [0.0, 0.0, 0.0]


async def test_a_chunk_that_hangs_spaces_the_next_ones_by_a_tenth_of_a_second(
    pace: Pace, clock: Clock
) -> None:
    async with pace.turn():
        clock.now_s += 60.0
    pace.fetched()
    assert waits_s(pace)[:2] == pytest.approx([0.0, SPACING * MAX_CHUNK_S])


async def test_whoever_fetches_makes_uploads_take_turns(tmp_path: Path, clock: Clock) -> None:
    async with running_store(tmp_path, clock=clock) as running:
        store = running.store
        store.pace.took(CHUNK_S)
        assert waits_s(store.pace) == [0.0, 0.0, 0.0]
        with pytest.raises(VersionNotFound):
            await store.lease(bytes(32), PageLayout(geometry=TINY, dtype=Dtype.FP32))
        assert waits_s(store.pace)[:2] == pytest.approx([0.0, SPACING * CHUNK_S])
