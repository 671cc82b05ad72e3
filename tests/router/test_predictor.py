"""The predictor, alone and on the clock of workers that compute nothing."""

import random
import statistics

import pytest

from lorry.router.predictor import (
    PRIOR_FETCH_BYTES_PER_S,
    PRIOR_STEP_S,
    PRIOR_TOKENS_PER_S,
    Predictor,
    step_s,
)
from lorry.router.request import Request
from lorry.router.worker import Worker, WorkerStatus
from tests.support.router_requests import ROOMY, dispatcher, request, worker
from tests.support.virtual_workers import VirtualFleet

MEASURED = WorkerStatus(
    prefill_tokens_per_s=1000.0,
    step_s=[(1, 0.01), (8, 0.017)],
    adapter_load_bytes_per_s=1e9,
)


def test_priors_promise_too_much_rather_than_too_little() -> None:
    predicted = Predictor().service_s(request(num_prompt_tokens=100), worker(), 0.0)
    assert predicted == pytest.approx(100 / PRIOR_TOKENS_PER_S + PRIOR_STEP_S)


def test_a_request_alone_takes_its_prompt_and_a_step() -> None:
    measured = worker(status=MEASURED)
    predicted = Predictor().service_s(request(num_prompt_tokens=100), measured, 0.0)
    assert predicted == pytest.approx(0.1 + 0.01)


def test_a_request_waits_for_what_has_not_begun() -> None:
    busy = worker(status=MEASURED)
    busy.add(request(num_prompt_tokens=300))
    predicted = Predictor().service_s(request(num_prompt_tokens=100), busy, 0.0)
    assert predicted == pytest.approx(0.005 + 0.3 + 0.1 + 0.011)  # half of the step under way
    busy.begin(next(iter(busy.unstarted)))
    predicted = Predictor().service_s(request(num_prompt_tokens=100), busy, 0.0)
    assert predicted == pytest.approx(0.005 + 0.1 + 0.011)


def test_an_adapter_that_is_absent_takes_its_load_beside_the_queue() -> None:
    asked = request(version=b"v", num_prompt_tokens=100)
    asked.adapter_bytes = 50_000_000
    cold, host = worker(status=MEASURED), worker(status=MEASURED, host={b"v"})
    hot = worker(status=MEASURED, gpu={b"v"})
    fetch_s = 50_000_000 / PRIOR_FETCH_BYTES_PER_S
    seconds = [Predictor().service_s(asked, w, 0.0) for w in (hot, host, cold)]
    assert seconds == pytest.approx([0.11, 0.05 + 0.11, 0.05 + fetch_s + 0.11])


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 0.01), (4, 0.013), (8, 0.017), (99, 0.017 + 0.091)]
)
def test_steps_lie_on_the_line_between_what_was_measured(rows: int, seconds: float) -> None:
    assert step_s(worker(status=MEASURED), rows) == pytest.approx(seconds)


def errors_after(fleet: VirtualFleet, since_s: float) -> list[float]:
    """Of predictions at arrival, of requests that arrived since then."""
    return [
        abs(r.predicted_ttft_s - fleet.ended.ttft_s(r)) / fleet.ended.ttft_s(r)
        for r in fleet.ended.finished
        if r.arrival_s >= since_s and r.predicted_ttft_s is not None
    ]


@pytest.mark.parametrize("load", [0.5, 0.9, 1.3])
def test_a_worker_of_half_its_speed_is_known_within_ten_seconds(load: float) -> None:
    fleet = VirtualFleet(dispatcher(limits=ROOMY))
    virtual, draw = fleet.workers["w0"], random.Random(1)
    capacity = 256 / (virtual.step_s + 256 * virtual.row_s)  # tokens per second
    now_s = 0.0
    while now_s < 60.0:
        now_s += draw.expovariate(load * capacity / 2 / 210)
        fleet.arrive(
            request(arrival_s=now_s, num_prompt_tokens=draw.randrange(20, 380), max_tokens=10)
        )

    def halve() -> None:
        virtual.step_s *= 2
        virtual.row_s *= 2

    fleet.run(30.0)
    assert statistics.median(errors_after(fleet, 10.0)) < 0.2
    halve()
    fleet.run(400.0)
    assert statistics.median(errors_after(fleet, 40.0)) < 0.2


def test_a_queue_that_each_step_empties_says_nothing_of_the_pace() -> None:
    predictor, busy = Predictor(), worker(status=MEASURED, submit_limit=1000)
    now_s = 0.0
    for _ in range(100):
        pair = [request(num_prompt_tokens=4, arrival_s=now_s) for _ in range(2)]
        for one in pair:
            predictor.advance(busy, now_s)
            one.seq, one.last_submit_s = busy.add(one), now_s
        now_s += 0.025  # the step under way and their own
        for one in pair:
            predictor.begin(one, busy, now_s)
            busy.remove(one)
    assert predictor.pace(busy) == MEASURED.prefill_tokens_per_s


def test_a_queue_that_steps_pass_over_tells_the_pace() -> None:
    predictor, busy = Predictor(), worker(status=MEASURED, submit_limit=1000)
    queued = [request(num_prompt_tokens=50) for _ in range(400)]
    for one in queued:
        one.seq = busy.add(one)
    for number, one in enumerate(queued, 1):
        predictor.begin(one, busy, 1.0 + 0.1 * number)
        busy.remove(one)
    assert predictor.pace(busy) == pytest.approx(500, rel=0.2)


def test_a_queue_goes_no_faster_than_running_requests_leave_of_the_steps() -> None:
    busy = worker(status=MEASURED, step_tokens=10)
    for _ in range(8):
        one = request()
        one.seq = busy.add(one)
        busy.begin(one)
    assert Predictor().pace(busy) == pytest.approx(2 / 0.018)


def test_tokens_that_come_slower_than_steps_last_tell_what_a_further_step_lasts() -> None:
    predictor, busy = Predictor(), worker(status=MEASURED, submit_limit=1000)
    first = request()
    first.seq = busy.add(first)
    predictor.begin(first, busy, 1.0)
    busy.begin(first)
    assert predictor.tpot_s(busy) == pytest.approx(0.011)
    for number in range(300):
        first.output_ids.append(1)
        predictor.draw(first, 1.0 + number * 0.02)
    assert predictor.tpot_s(busy) == pytest.approx(0.022, rel=0.05)


def followed(busy: Worker) -> tuple[Predictor, Request]:
    """A predictor, and the one request that runs at `busy` and tells it of the steps."""
    predictor, pilot = Predictor(), request()
    pilot.seq = busy.add(pilot)
    predictor.begin(pilot, busy, 1.0)
    busy.begin(pilot)
    return predictor, pilot


def test_a_few_slow_steps_tell_when_a_first_token_comes_before_they_count_for_all_others() -> None:
    busy = worker(status=MEASURED, submit_limit=1000)
    predictor, pilot = followed(busy)
    before_s = predictor.service_s(request(num_prompt_tokens=4), busy, 1.0)
    for number in range(15):  # in 0.45 s, thrice as long
        pilot.output_ids.append(1)
        predictor.draw(pilot, 1.0 + number * 0.03)
    predicted = predictor.service_s(request(num_prompt_tokens=4), busy, 1.45)
    assert 2.0 * before_s < predicted < 3.0 * before_s
    assert predictor.tpot_s(busy) < 0.011 * 1.5


def test_steps_that_prompts_make_longer_as_expected_are_not_stretched() -> None:
    busy = worker(status=MEASURED, submit_limit=1000)
    predictor, pilot = followed(busy)
    before_s = predictor.service_s(request(num_prompt_tokens=4), busy, 1.0)
    for number in range(100):  # each with a prompt of 20 tokens
        other = request(num_prompt_tokens=20)
        other.seq = busy.add(other)
        predictor.begin(other, busy, 1.0 + number * 0.03)
        busy.remove(other)
        pilot.output_ids.append(1)
        predictor.draw(pilot, 1.0 + number * 0.03)
    assert predictor.service_s(request(num_prompt_tokens=4), busy, 4.0) == pytest.approx(before_s)
    assert predictor.tpot_s(busy) > 0.011 * 2


def test_a_point_of_a_quieter_time_promises_no_cheaper_rows_than_a_prompt_has() -> None:
    known = worker(status=WorkerStatus(prefill_tokens_per_s=1000.0, step_s=[(1, 0.02), (64, 0.02)]))
    assert [step_s(known, rows) for rows in (1, 33, 64)] == pytest.approx([0.02, 0.052, 0.083])


def test_another_request_tells_of_the_steps_once_the_one_that_did_is_gone() -> None:
    predictor, busy = Predictor(), worker(status=MEASURED)
    first, second = request(), request()
    for one in (first, second):
        one.seq = busy.add(one)
        predictor.begin(one, busy, 1.0)
        busy.begin(one)
    assert list(predictor.pilots) == [first]
    busy.remove(first)
    predictor.leave(first)
    assert list(predictor.pilots) == [second]
    predictor.forget(busy)
    assert not predictor.pilots


def test_one_long_gap_between_two_tokens_is_soon_forgotten() -> None:
    predictor, busy = Predictor(), worker(status=MEASURED)
    first = request()
    first.seq = busy.add(first)
    predictor.begin(first, busy, 1.0)
    busy.begin(first)
    for now_s in (1.0, 1.01, 60.0, *(60.0 + 0.01 * number for number in range(1, 300))):
        first.output_ids.append(1)
        predictor.draw(first, now_s)
    assert predictor.tpot_s(busy) == pytest.approx(0.011, rel=0.01)
