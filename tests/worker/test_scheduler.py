import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.worker import messages as m
from lorry.worker.drawn import Drawn, DrawnLogprobs
from lorry.worker.residency import AdapterState
from tests.support.schedules import STOP, Driver


def test_prompt_is_computed_in_chunks_beside_decodes() -> None:
    driver = Driver(step_tokens=8)
    driver.submit(1, prompt=3, max_tokens=20)
    driver.step()
    driver.submit(2, prompt=18, max_tokens=2)
    assert [driver.rows_of(driver.step()) for _ in range(4)] == [
        {1: 1, 2: 7},
        {1: 1, 2: 7},
        {1: 1, 2: 4},
        {1: 1, 2: 1},
    ]
    assert len(driver.tokens[2]) == 2


def test_rows_of_one_adapter_are_consecutive() -> None:
    driver = Driver(adapter_pages={b"a": 1, b"b": 1})
    for number in range(1, 7):
        driver.submit(number, 2, 4, version=[b"a", b"b", b""][number % 3])
    *_, plan = [driver.step() for _ in range(3)]
    assert plan.batch is not None
    slots = plan.batch.slot_S.tolist()
    assert slots == sorted(slots)
    assert len(set(slots)) == 3


def test_output_ends_at_a_stop_token_or_at_max_tokens() -> None:
    driver = Driver()
    driver.submit(1, 2, max_tokens=3)
    driver.submit(2, 2, max_tokens=30)
    for _ in range(3):
        driver.step()
    driver.next_token = STOP
    driver.run()
    assert driver.finished[1].reason is m.FinishReason.LENGTH
    assert driver.tokens[1] == [1, 1, 1]
    assert driver.finished[2].reason is m.FinishReason.STOP
    assert driver.tokens[2] == [1, 1, 1, STOP]
    assert driver.finished[2].completion_tokens == 4


def test_nothing_waits_for_a_fetch_but_the_requests_that_need_it() -> None:
    driver = Driver(adapter_pages={b"slow": 2}, instant_fetch=False)
    driver.submit(1, 2, 4, version=b"slow")
    driver.submit(2, 2, 4)
    for _ in range(6):
        driver.step()
    assert 2 in driver.finished
    assert driver.tokens[1] == []
    driver.finish_fetch(b"slow")
    driver.run()
    assert len(driver.tokens[1]) == 4
    assert driver.finished[1].adapter_load_s > 0


def test_any_number_of_requests_may_wait_for_fetches_beside_those_that_need_none() -> None:
    slow = [b"slow %d" % number for number in range(500)]
    driver = Driver(adapter_pages=dict.fromkeys([*slow, b"here"], 1), instant_fetch=False)
    driver.submit(0, 2, 4, version=b"here")
    driver.step()
    driver.finish_fetch(b"here")
    driver.run()
    for number, version in enumerate(slow, start=1):
        driver.submit(number, 2, 4, version=version)
    driver.submit(501, 2, 4)
    driver.submit(502, 2, 4, version=b"here")
    for _ in range(6):
        driver.step()
    assert set(driver.finished) == {0, 501, 502}


def calls_of(work: Callable[[], object]) -> int:
    """How many functions `work` calls, those it calls in turn included."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()  # what it would free calls functions, too
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


@pytest.mark.parametrize("are_alike", [False, True], ids=["own adapters", "one adapter"])
def test_requests_that_await_fetches_cost_a_step_nothing(are_alike: bool) -> None:
    calls = list[int]()
    for num_waiting in (100, 1000):
        driver = Driver(instant_fetch=False)
        for number in range(num_waiting):
            driver.submit(number, 2, 4, version=b"all" if are_alike else b"%d" % number)
        driver.submit(num_waiting, 2, 40)
        for _ in range(3):
            driver.step()
        calls.append(calls_of(partial(driver.scheduler.plan, driver.now_s, [])))
    assert calls[0] == calls[1]


def test_fetches_stay_in_the_order_of_arrival_whoever_leaves_or_comes_back() -> None:
    driver = Driver(max_fetches=1, instant_fetch=False)
    for number, version in enumerate([b"a", b"b", b"b", b"c", b"a"], start=1):
        driver.submit(number, 2, 4, version=version)
    assert driver.step().fetches == [b"a"]
    driver.note(*driver.scheduler.cancel([2]))
    assert driver.step().fetches == []
    fail_fetches(driver, [b"a"])
    assert set(driver.finished) == {1, 2, 5}
    assert driver.step().fetches == [b"b"]
    driver.submit(6, 2, 4, version=b"a")
    driver.note(*driver.scheduler.cancel([3]))
    fail_fetches(driver, [b"b"])
    assert driver.step().fetches == [b"c"]


def test_fetches_are_of_the_oldest_requests_and_these_start_first() -> None:
    versions = [b"%d" % number for number in range(8)]
    driver = Driver(adapter_pages=dict.fromkeys(versions, 1), instant_fetch=False, max_fetches=2)
    for number, version in enumerate(versions):
        driver.submit(number, 2, 4, version=version)
    fetches = list[bytes]()
    for _ in range(4):
        fetches += driver.step().fetches
        for version in reversed(fetches[-2:]):
            driver.finish_fetch(version)
    assert fetches == versions
    driver.run()
    assert list(driver.finished) == list(range(8))


def test_only_so_many_requests_that_find_no_room_are_tried_in_a_step() -> None:
    driver = Driver(pages=12, max_considered=2, max_passed_over=100)
    driver.submit(1, 4, 40)
    driver.step()
    driver.submit(2, 44, 4)
    driver.submit(3, 44, 4)
    driver.submit(4, 2, 4)
    driver.step()
    assert driver.tokens[4] == []
    driver.note(*driver.scheduler.cancel([3]))
    driver.step()
    assert len(driver.tokens[4]) == 1


def test_prefetch_loads_an_adapter_that_no_request_needs_yet() -> None:
    driver = Driver(adapter_pages={b"next": 3})
    driver.scheduler.set_prefetch([b"next"])
    for _ in range(3):
        driver.step()
    adapter = driver.scheduler.residency.find(b"next")
    assert adapter is not None
    assert adapter.state is AdapterState.RESIDENT


def fail_fetches(driver: Driver, versions: list[bytes]) -> None:
    for version in versions:
        adapter = driver.scheduler.residency.find(version)
        assert adapter is not None
        failure = m.Failure("VERSION_NOT_FOUND", "no such version")
        driver.note(*driver.scheduler.fail_adapter(adapter, failure, driver.now_s))


def test_prefetch_that_fails_is_tried_again_after_seconds_not_steps() -> None:
    driver = Driver(instant_fetch=False)
    driver.scheduler.set_prefetch([b"gone", b"lost"])
    tried = list[tuple[float, bytes]]()
    for _ in range(200):
        fetches = driver.step().fetches
        driver.now_s -= 0.875  # eight steps in a second
        tried += [(driver.now_s, version) for version in fetches]
        fail_fetches(driver, fetches)
    for version in (b"gone", b"lost"):
        times_s = [now_s for now_s, tried_version in tried if tried_version == version]
        assert times_s == [0.125, 10.25, 20.375]


def test_prefetch_that_failed_is_tried_again_when_it_is_newly_wanted() -> None:
    driver = Driver(instant_fetch=False)
    for versions, fetched in [
        ([b"gone"], [b"gone"]),
        ([b"other", b"gone"], [b"other"]),  # wanted still
        ([b"third"], [b"third"]),
        ([b"gone"], [b"gone"]),
    ]:
        driver.scheduler.set_prefetch(versions)
        fetches = driver.step().fetches
        assert fetches == fetched
        fail_fetches(driver, fetches)


def test_request_needs_no_retry_time_of_a_prefetch() -> None:
    driver = Driver(adapter_pages={b"late": 1}, instant_fetch=False)
    driver.scheduler.set_prefetch([b"late"])
    fail_fetches(driver, driver.step().fetches)
    assert driver.step().fetches == []
    driver.submit(1, 2, 4, version=b"late")
    assert driver.step().fetches == [b"late"]
    driver.finish_fetch(b"late")
    driver.run()
    assert len(driver.tokens[1]) == 4


def test_prefetches_leave_fetches_to_requests() -> None:
    driver = Driver(adapter_pages={b"%d" % n: 1 for n in range(9)}, instant_fetch=False)
    driver.scheduler.set_prefetch([b"%d" % n for n in range(8)])
    assert driver.step().fetches == [b"0", b"1", b"2", b"3"]
    assert driver.step().fetches == []
    driver.submit(1, 2, 4, version=b"8")
    assert driver.step().fetches == [b"8"]
    driver.finish_fetch(b"0")
    driver.finish_fetch(b"1")
    assert driver.step().fetches == [b"4"]


def test_a_full_step_brings_the_next_requests_adapters_nearer() -> None:
    driver = Driver(max_running=1, adapter_pages={b"a": 2, b"b": 2})
    driver.submit(1, 4, 30, version=b"a")
    driver.submit(2, 4, 4, version=b"b")
    for _ in range(6):
        driver.step()
    adapter = driver.scheduler.residency.find(b"b")
    assert adapter is not None
    assert adapter.state is AdapterState.RESIDENT
    assert driver.tokens[2] == []


def test_prefetch_never_takes_what_running_requests_need() -> None:
    driver = Driver(pages=8, adapter_pages={b"used": 2, b"next": 4})
    driver.submit(1, 4, 16, version=b"used")
    driver.scheduler.set_prefetch([b"next"])
    driver.run()
    assert len(driver.tokens[1]) == 16
    assert driver.scheduler.preemptions == 0


def test_only_growth_preempts_and_the_newest_goes() -> None:
    driver = Driver(pages=6)
    driver.submit(1, 4, 15)
    driver.submit(2, 4, 15)
    driver.run()
    preempted = [number for plan in driver.plans for number in plan.preempted]
    assert set(preempted) == {2}
    assert [len(driver.tokens[number]) for number in (1, 2)] == [15, 15]


def test_request_that_can_never_fit_is_refused_at_once() -> None:
    driver = Driver(pages=4)
    driver.submit(1, prompt=10, max_tokens=7)
    assert driver.finished[1].failure is not None
    assert driver.finished[1].failure.reason == "POOL_TOO_SMALL"
    driver.submit(2, prompt=10, max_tokens=6)
    driver.run()
    assert len(driver.tokens[2]) == 6


def test_adapter_that_leaves_no_room_for_the_request_ends_it() -> None:
    driver = Driver(pages=6, adapter_pages={b"big": 4})
    driver.submit(1, prompt=8, max_tokens=4, version=b"big")
    driver.submit(2, prompt=4, max_tokens=4, version=b"big")
    driver.run()
    assert driver.finished[1].failure is not None
    assert driver.finished[1].failure.reason == "POOL_TOO_SMALL"
    assert len(driver.tokens[2]) == 4


def test_context_limit_is_enforced() -> None:
    driver = Driver(max_context_tokens=16)
    driver.submit(1, prompt=10, max_tokens=7)
    assert driver.finished[1].failure is not None
    assert driver.finished[1].failure.reason == "CONTEXT_LENGTH_EXCEEDED"


def test_large_request_is_skipped_but_not_for_ever() -> None:
    driver = Driver(pages=12, max_passed_over=3, max_running=4)
    driver.submit(1, 4, 12)
    driver.submit(2, 36, 4)  # ten pages: it needs the pool nearly alone
    for number in range(3, 40):
        driver.submit(number, 4, 8)
    driver.run()
    order = list(driver.finished)
    assert order.index(2) < order.index(12)


def test_deadline_ends_waiting_and_running_requests() -> None:
    driver = Driver(adapter_pages={b"slow": 1}, instant_fetch=False)
    driver.send(1, 2, 100, remaining_s=4.0)
    driver.send(2, 2, 8, version=b"slow", remaining_s=4.0)
    for _ in range(6):
        driver.step()
    for number in (1, 2):
        failure = driver.finished[number].failure
        assert failure is not None
        assert failure.reason == "DEADLINE_EXPIRED"
    assert 0 < len(driver.tokens[1]) < 100
    assert driver.scheduler.pool.free == driver.scheduler.pool.total


def test_cancelled_requests_free_everything() -> None:
    driver = Driver(adapter_pages={b"a": 2})
    driver.submit(1, 9, 50, version=b"a")
    driver.submit(2, 40, 50)
    for _ in range(4):
        driver.step()
    driver.submit(3, 4, 50)
    driver.note(*driver.scheduler.cancel([1, 2, 3, 3, 77]))
    driver.scheduler.check_integrity()
    assert {end.reason for end in driver.finished.values()} == {m.FinishReason.CANCELLED}
    assert driver.scheduler.pool.kv == 0
    assert not driver.scheduler.requests


def test_failed_fetch_ends_the_requests_that_wait_for_it() -> None:
    driver = Driver(instant_fetch=False)
    driver.submit(1, 2, 4, version=b"gone")
    driver.submit(2, 2, 4)
    driver.step()
    adapter = driver.scheduler.residency.find(b"gone")
    assert adapter is not None
    failure = m.Failure("VERSION_NOT_FOUND", "no such version")
    driver.note(*driver.scheduler.fail_adapter(adapter, failure, driver.now_s))
    driver.run()
    assert driver.finished[1].failure == failure
    assert len(driver.tokens[2]) == 4


def test_results_that_are_read_late_keep_their_step() -> None:
    driver = Driver()
    driver.submit(1, prompt=3, max_tokens=8)
    scheduler = driver.scheduler
    first = scheduler.plan(0.0, []).batch
    second = scheduler.plan(0.0, []).batch
    assert first is not None
    assert second is not None
    drawn = Drawn(np.ones(1, dtype=np.int32))
    steps = [scheduler.commit(batch, drawn, 0.0)[0].step for batch in (first, second)]
    assert steps == [1, 2]
    assert scheduler.table.num_read_R[0] == 5


def test_a_result_that_comes_after_its_request_ended_is_dropped() -> None:
    driver = Driver()
    driver.submit(1, prompt=3, max_tokens=8)
    batch = driver.scheduler.plan(0.0, []).batch
    assert batch is not None
    driver.note(*driver.scheduler.cancel([1]))
    driver.submit(2, prompt=5, max_tokens=8)  # takes the same row
    driver.scheduler.plan(0.0, [])
    tokens, finished = driver.scheduler.commit(batch, Drawn(np.ones(1, dtype=np.int32)), 0.0)
    assert (tokens.requests, finished) == ([], [])
    driver.scheduler.check_integrity()


def test_logprobs_stay_with_their_requests_when_another_has_ended() -> None:
    driver = Driver()
    for number in (1, 2, 3):
        driver.submit(number, prompt=3, max_tokens=8)
    batch = driver.scheduler.plan(0.0, []).batch
    assert batch is not None
    driver.note(*driver.scheduler.cancel([1]))
    top_ids = np.array([[7, 8], [5, 6], [3, 4]])
    logprobs = DrawnLogprobs(
        np.array([2, 1, m.NOT_ASKED]), np.array([-1.0, -2.0, -3.0]), top_ids, -0.5 * top_ids
    )
    drawn = Drawn(np.array([11, 12, 13], dtype=np.int32), logprobs)
    tokens, _ = driver.scheduler.commit(batch, drawn, 0.0)
    assert (tokens.requests, tokens.token_ids) == ([2, 3], [12, 13])
    assert tokens.logprobs is not None
    assert list(tokens.logprobs.rows()) == [m.RowLogprobs(-2.0, [5], [-2.5]), None]


def test_pinned_adapter_is_never_evicted() -> None:
    driver = Driver(pages=8, adapter_pages={b"pinned": 3, b"a": 3, b"b": 3})
    for _ in range(3):
        plan = driver.scheduler.plan(driver.now_s, [b"pinned"])
        for version in plan.fetches:
            driver.finish_fetch(version)
        for loaded in plan.loads:
            driver.scheduler.residency.finish_load(loaded, driver.now_s)
    adapter = driver.scheduler.residency.find(b"pinned")
    assert adapter is not None
    driver.scheduler.residency.set_pinned(adapter, True)
    for number, version in enumerate([b"a", b"b", b"a", b"b"], start=1):
        driver.submit(number, 4, 4, version=version)
    driver.run()
    assert adapter.state is AdapterState.RESIDENT
    assert all(len(driver.tokens[number]) == 4 for number in range(1, 5))


VERSIONS = {b"": 0, b"a": 1, b"b": 3, b"c": 7, b"d": 12}
ACTIONS = st.one_of(
    st.tuples(
        st.just("submit"),
        st.integers(1, 40),
        st.integers(1, 30),
        st.sampled_from(sorted(VERSIONS)),
    ),
    st.tuples(st.just("cancel"), st.integers(1, 40)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("stop"), st.booleans()),
    st.tuples(st.just("prefetch"), st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=3)),
    st.tuples(st.just("reclaim"), st.sampled_from([b"a", b"b", b"c", b"d"])),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=60), st.integers(20, 60), st.integers(8, 24))
def test_any_schedule_keeps_its_books_and_finishes_every_request(
    actions: list[tuple[Any, ...]], pages: int, step_tokens: int
) -> None:
    driver = Driver(pages=pages, adapter_pages=VERSIONS, step_tokens=step_tokens)
    for action, *arguments in actions:
        _apply(driver, str(action), arguments)
    driver.next_token = 1
    driver.run()
    for number in driver.tokens:
        end = driver.finished[number]
        assert end.completion_tokens == len(driver.tokens[number]) or end.failure is not None
    for plan in driver.plans:
        assert plan.batch is None or plan.batch.num_tokens <= step_tokens
    assert driver.scheduler.pool.kv == 0


def _apply(driver: Driver, action: str, arguments: list[Any]) -> None:
    scheduler = driver.scheduler
    match action:
        case "submit":
            prompt, max_tokens, version = arguments
            driver.submit(len(driver.tokens) + 1, prompt, max_tokens, version)
        case "cancel":
            driver.note(*scheduler.cancel(arguments))
        case "step":
            for _ in range(arguments[0]):
                driver.step()
        case "stop":
            driver.next_token = STOP if arguments[0] else 1
        case "prefetch":
            scheduler.set_prefetch(arguments[0])
        case "reclaim":
            adapter = scheduler.residency.find(arguments[0])
            if adapter is not None and adapter.image is not None:
                scheduler.residency.drop_image(adapter)
    scheduler.check_integrity()
