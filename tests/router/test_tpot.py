"""Objectives for the time per output token: where requests go, who waits, and who is aborted."""

import math
from typing import Any

import pytest

from lorry.router.actions import Abort, Submit
from lorry.router.dispatcher import Dispatcher
from lorry.router.refusals import slo_unattainable
from lorry.router.request import Request
from lorry.router.slo import Slo
from lorry.router.worker import Worker, WorkerStatus
from lorry.rpc.errors import SloUnattainable
from tests.support.router_requests import ROOMY, dispatcher, request, worker

# A step takes 10 ms, and 1 ms more for each further row.
STATUS = WorkerStatus(prefill_tokens_per_s=1e4, step_s=[(1, 0.010), (64, 0.073)])


def steady(*workers: Worker, **options: Any) -> Dispatcher:
    policies: dict[str, Any] = {
        "admission": "early-abort",
        "tpot_share": 1.0,
        "worker_backlog_s": 0.0,
    }
    built = dispatcher(limits=ROOMY, **(policies | options))
    for attached in workers:
        built.attach(attached)
    return built


def measured(name: str = "w1", **fields: Any) -> Worker:
    return worker(name, status=STATUS, **fields)


def send(router: Dispatcher, count: int = 1, **slo: Any) -> list[Request]:
    sent = [request(slo=Slo(**slo)) for _ in range(count)]
    for one in sent:
        router.receive(one)
        router.enqueue(one, 0.0)
    return sent


def submitted(router: Dispatcher, now_s: float = 0.0) -> list[Request]:
    """Whom a plan sends; the first tokens come at once."""
    actions = router.plan(now_s)
    router.check_integrity()
    sent = [action.request for action in actions if isinstance(action, Submit)]
    for one in sent:
        one.output_ids.append(1)
        router.drew(one, now_s)
    return sent


def test_a_worker_is_filled_as_far_as_its_steps_keep_what_is_asked_for() -> None:
    only = measured()
    router = steady(only)
    asked = send(router, 20, tpot_s=0.0155)
    assert submitted(router) == asked[:6]  # steps of 15 ms
    assert len(only.active) == 6


def test_a_share_of_the_objective_is_left_free() -> None:
    router = steady(measured(), tpot_share=0.8)
    assert len(submitted_of(router, send(router, 20, tpot_s=0.0155))) == 3  # 12 of 15.5 ms


def submitted_of(router: Dispatcher, asked: list[Request]) -> list[Request]:
    sent = submitted(router)
    assert set(sent) <= set(asked)
    return sent


def test_others_do_not_slow_down_those_that_asked() -> None:
    router = steady(measured())
    send(router, 1, tpot_s=0.0155)
    send(router, 20)
    assert len(submitted(router)) == 6


def test_without_the_share_or_early_abort_objectives_decide_nothing() -> None:
    for options in ({"tpot_share": 0.0}, {"admission": "all"}):
        router = steady(measured(), **options)
        send(router, 20, tpot_s=0.001)
        assert len(submitted(router)) == 20


def test_quick_ones_share_a_worker_and_slow_ones_go_elsewhere() -> None:
    first, second = measured("w1"), measured("w2")
    router = steady(first, second)
    quick = send(router, 1, tpot_s=0.0155)
    slow = send(router, 1)
    submitted(router)
    assert quick[0].worker_name != slow[0].worker_name
    more_quick, more_slow = send(router, 4, tpot_s=0.0155), send(router, 12)
    submitted(router)
    assert {r.worker_name for r in more_quick} == {quick[0].worker_name}
    assert {r.worker_name for r in more_slow} == {slow[0].worker_name}


def test_what_no_step_is_short_enough_for_is_refused_at_once() -> None:
    router = steady(measured())
    asked = request(slo=Slo(tpot_s=0.005))
    router.receive(asked)
    with pytest.raises(SloUnattainable, match=r"every 0\.0100 s, the request asks for 0\.005"):
        router.enqueue(asked, 0.0)


def test_nothing_is_refused_by_what_was_not_measured_of_a_lone_request() -> None:
    router = steady(worker(status=WorkerStatus(step_s=[(4, 0.013), (64, 0.073)])))
    assert submitted_of(router, send(router, 1, tpot_s=0.005))


def test_an_abort_tells_the_objective_that_is_out_of_reach() -> None:
    router = steady(measured())
    send(router, 12)
    submitted(router)
    send(router, 1, ttft_s=1.0, tpot_s=0.0155)
    assert submitted(router) == []
    (abort,) = [action for action in router.plan(1.5) if isinstance(action, Abort)]
    assert abort.tpot_s == pytest.approx(0.022)
    error = slo_unattainable(abort)
    assert error.metadata["predictedTpotS"] == "0.0220"
    assert error.metadata["askedTpotS"] == "0.0155"


def test_one_that_waits_for_anothers_tokens_is_told_of_its_first() -> None:
    router = steady(measured())
    send(router, 6, tpot_s=0.0155)
    assert len(submitted(router)) == 6
    send(router, 1, ttft_s=1.0)
    (abort,) = [action for action in router.plan(1.5) if isinstance(action, Abort)]
    assert abort.tpot_s is None
    assert slo_unattainable(abort).metadata["askedTtftS"] == "1"


def test_steps_that_last_longer_than_a_worker_says_count_as_they_are() -> None:
    only = measured()
    router = steady(only)
    (first,) = send(router, 1)
    submitted(router)
    for number in range(1, 200):
        first.output_ids.append(1)
        router.drew(first, number * 0.020)  # twice as long
    send(router, 20, tpot_s=0.0305)
    assert len(submitted(router)) == 5  # and that of six rows is 30 ms


def test_a_worker_knows_the_tightest_objective_of_those_that_it_has() -> None:
    only = measured()
    loose, tight, none = (request(slo=Slo(tpot_s=tpot_s)) for tpot_s in (0.5, 0.1, None))
    for one in (loose, tight, none):
        one.seq = only.add(one)
    assert only.tightest_tpot_s == 0.1
    only.remove(tight)
    assert only.tightest_tpot_s == 0.5
    only.remove(loose)
    assert only.tightest_tpot_s == math.inf


def test_a_share_of_more_than_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tpot_share must not exceed 1, got 1\.5"):
        dispatcher(tpot_share=1.5)
