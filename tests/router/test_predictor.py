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
from lorry.router.worker import WorkerStatus
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
    assert predicted == pytest.approx(0.3 + 0.1 + 0.011)
    busy.begin(next(iter(busy.unstarted)))
    predicted = Predictor().service_s(request(num_prompt_tokens=100), busy, 0.0)
    assert predicted == pytest.approx(0.005 + 0.1 + 0.011)  # half of the step under way


def test_an_adapter_that_is_absent_takes_its_load_beside_the_queue() -> None:
    asked = request(version=b"v", num_prompt_tokens=100)
    asked.adapter_bytes = 50_000_000
    cold, host = worker(status=MEASURED), worker(status=MEASURED, host={b"v"})
    hot = worker(status=MEASURED, gpu={b"v"})
    fetch_s = 50_000_000 / PRIOR_FETCH_BYTES_PER_S
    seconds = [Predictor().service_s(asked, w, 0.0) for w in (hot, host, cold)]
    assert seconds == pytest.approx([0.11, 0.05 + 0.11, 0.05 + fetch_s + 0.11])


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.01), (4, 0.013), (8, 0.017), (99, 0.017)])
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
