"""Chunks of uploads take turns while fetches come, by a clock that the tests move."""

import asyncio
from pathlib import Path

import pytest

from lorry.adapter_store.pace import FETCHES_GO_ON_S, MAX_CHUNK_S, SPACING, Pace
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.rpc.errors import VersionNotFound
from tests.support.adapter_store import running_store
from tests.support.adapters import TINY

CHUNK_S = 0.004
SPACING_S = SPACING * CHUNK_S


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)


class Chunks:
    """That take their time, each in its turn."""

    def __init__(self, clock: Clock, pace: Pace) -> None:
        self._clock, self._pace = clock, pace
        self.begun_s: list[float] = []
        self.tenants: list[str] = []

    async def take(self, tenant: str = "a", chunk_s: float = CHUNK_S) -> None:
        async with self._pace.turn(tenant):
            self.begun_s.append(self._clock())
            self.tenants.append(tenant)
            self._clock.now_s += chunk_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(clock, clock.sleep)


@pytest.fixture
def chunks(clock: Clock, pace: Pace) -> Chunks:
    return Chunks(clock, pace)


async def test_chunks_need_not_wait_while_nobody_fetches(chunks: Chunks) -> None:
    for _ in range(3):
        await chunks.take()
    assert chunks.begun_s == pytest.approx([0.0, CHUNK_S, 2 * CHUNK_S])


async def test_chunks_are_spaced_by_what_they_take_while_fetches_come(
    chunks: Chunks, pace: Pace
) -> None:
    await chunks.take()
    pace.fetched()
    for _ in range(3):
        await chunks.take()
    assert chunks.begun_s[1:] == pytest.approx(
        [CHUNK_S, CHUNK_S + SPACING_S, CHUNK_S + 2 * SPACING_S]
    )


async def test_time_that_no_upload_used_is_not_made_up_for(
    chunks: Chunks, pace: Pace, clock: Clock
) -> None:
    pace.fetched()
    await chunks.take()
    await chunks.take()
    clock.now_s = 3 * SPACING_S
    pace.fetched()
    await chunks.take()
    await chunks.take()
    assert chunks.begun_s[2:] == pytest.approx([3 * SPACING_S, 4 * SPACING_S])


async def test_uploads_are_free_again_once_fetches_end(
    chunks: Chunks, pace: Pace, clock: Clock
) -> None:
    pace.fetched()
    await chunks.take()
    await chunks.take()
    free_s = clock.now_s = FETCHES_GO_ON_S + 0.001
    await chunks.take()
    await chunks.take()
    assert chunks.begun_s[2:] == pytest.approx([free_s, free_s + CHUNK_S])


async def test_a_chunk_that_hangs_makes_the_others_wait_for_a_tenth_of_a_second(
    chunks: Chunks, pace: Pace, clock: Clock
) -> None:
    await chunks.take(chunk_s=60.0)
    pace.fetched()
    await chunks.take(chunk_s=60.0)
    pace.fetched()
    await chunks.take()
    await chunks.take()
    assert chunks.begun_s[3] - chunks.begun_s[2] == pytest.approx(SPACING * MAX_CHUNK_S)


async def test_tenants_take_turns_however_many_uploads_each_has(chunks: Chunks, pace: Pace) -> None:
    await chunks.take()
    pace.fetched()
    await chunks.take()
    await asyncio.gather(*(chunks.take(tenant) for tenant in "aaaabb"))
    assert "".join(chunks.tenants[2:]) == "ababaa"


async def test_who_leaves_while_waiting_takes_no_turn(chunks: Chunks, pace: Pace) -> None:
    await chunks.take()
    pace.fetched()
    await chunks.take()
    waiting = [asyncio.create_task(chunks.take(f"t{number}")) for number in range(50)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    await chunks.take()
    assert chunks.begun_s == pytest.approx([0.0, CHUNK_S, CHUNK_S + SPACING_S])


async def test_whoever_fetches_makes_uploads_take_turns(tmp_path: Path) -> None:
    async with running_store(tmp_path, clock=(clock := Clock())) as running:
        store = running.store
        clock.now_s = 100.0
        assert not store.pace._fetches_come
        with pytest.raises(VersionNotFound):
            await store.lease(bytes(32), PageLayout(geometry=TINY, dtype=Dtype.FP32))
        assert store.pace._fetches_come
