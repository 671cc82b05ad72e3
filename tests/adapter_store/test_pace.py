"""Chunks of uploads wait their turns while fetches come, by a clock that the tests move."""

import pytest

from lorry.adapter_store.pace import BYTES_PER_S, FETCHES_GO_ON_S, Pace

CHUNK_BYTES = 1 << 20
SPACING_S = CHUNK_BYTES / BYTES_PER_S


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_chunks_need_not_wait_while_nobody_fetches() -> None:
    pace = Pace(Clock())
    assert [pace.take_turn(CHUNK_BYTES) for _ in range(3)] == [0.0] * 3


def test_chunks_of_all_uploads_are_spaced_while_fetches_come() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.fetched()
    waits_s = [pace.take_turn(num_bytes) for num_bytes in (CHUNK_BYTES, 2 * CHUNK_BYTES, 1)]
    assert waits_s == pytest.approx([0.0, SPACING_S, 3 * SPACING_S])


def test_time_that_no_upload_used_is_not_made_up_for() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.fetched()
    pace.take_turn(CHUNK_BYTES)
    clock.now_s += 4 * SPACING_S
    assert [pace.take_turn(CHUNK_BYTES) for _ in range(2)] == pytest.approx([0.0, SPACING_S])


def test_uploads_are_free_again_once_fetches_end() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.fetched()
    pace.take_turn(100 * CHUNK_BYTES)
    clock.now_s += FETCHES_GO_ON_S + 0.1
    assert pace.take_turn(CHUNK_BYTES) == 0.0
