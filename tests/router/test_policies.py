"""Policies of order, admission and clustering, through a dispatcher."""

import pytest

from lorry.router.actions import Abort, Submit
from lorry.router.admission import (
    KEPT_BACK_MEMORY_S,
    LESS_KEPT_BACK,
    MORE_KEPT_BACK,
    MOST_KEPT_BACK,
    EarlyAbort,
    SloraAbort,
)
from lorry.router.dispatcher import Dispatcher
from lorry.router.request import Request, RequestState
from lorry.router.slo import Slo
from tests.support.router_requests import ROOMY, dispatcher, request, worker
from tests.support.virtual_workers import VirtualFleet

S = RequestState


def arrive(router: Dispatcher, asked: Request, now_s: float = 0.0) -> Request:
    router.receive(asked)
    router.enqueue(asked, now_s)
    return asked


def sent(router: Dispatcher, now_s: float = 0.0) -> list[Request]:
    return [a.request for a in router.plan(now_s) if isinstance(a, Submit)]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("arrival", [0, 1, 2]),
        ("newest", [2, 1, 0]),
        ("deadline", [1, 2, 0]),
        ("sparing", [2, 1, 0]),
    ],
)
def test_each_order_has_its_first(order: str, expected: list[int]) -> None:
    router = dispatcher(order=order)
    router.attach(worker())
    asked = [
        request(arrival_s=0.0, slo=Slo(ttft_s=9.0)),
        request(arrival_s=1.0, slo=Slo(ttft_s=1.0)),
        request(arrival_s=2.0, slo=Slo(ttft_s=1.0)),
    ]
    for each in asked:
        arrive(router, each)
    assert sent(router) == [asked[index] for index in expected]


def test_a_small_request_goes_before_a_large_one_of_the_same_time() -> None:
    router = dispatcher(order="sparing")
    router.attach(worker())
    large, small = request(max_tokens=100), request(max_tokens=5)
    arrive(router, large)
    arrive(router, small)
    assert sent(router) == [small, large]


def test_a_full_cluster_passes_others_over_but_not_for_longer_than_it_may() -> None:
    router, only = dispatcher(cluster_adapters=1, cluster_wait_s=1.0), worker(submit_limit=1)
    router.attach(only)
    first = arrive(router, request(version=b"a"))
    assert sent(router) == [first]
    other, *mates = (arrive(router, request(version=v)) for v in (b"b", b"a", b"a", b"a"))
    for now_s, expected in ((0.0, mates[0]), (0.5, mates[1]), (1.0, other), (1.1, mates[2])):
        only.raise_submit_limit(only.submit_limit + 1)
        assert sent(router, now_s) == [expected]
        router.check_integrity()


def test_a_full_cluster_passes_nobody_over_who_has_an_objective() -> None:
    router, only = dispatcher(cluster_adapters=1, cluster_wait_s=1.0), worker(submit_limit=1)
    router.attach(only)
    first = arrive(router, request(version=b"a"))
    assert sent(router) == [first]
    other = arrive(router, request(version=b"b", slo=Slo(ttft_s=1000.0)))
    mate = arrive(router, request(version=b"a", slo=Slo(ttft_s=2000.0)))
    for expected in (other, mate):
        only.raise_submit_limit(only.submit_limit + 1)
        assert sent(router) == [expected]


def test_a_full_cluster_leaves_no_room_empty() -> None:
    router = dispatcher(cluster_adapters=1)
    router.attach(worker())
    asked = [arrive(router, request(version=v)) for v in (b"a", b"b", b"c")]
    assert sent(router) == asked


def test_what_is_too_late_is_aborted_once_and_never_sent() -> None:
    router, only = dispatcher(admission="early-abort"), worker(submit_limit=1)
    router.attach(only)
    sent_first = arrive(router, request())
    assert sent(router) == [sent_first]
    late = arrive(router, request(slo=Slo(ttft_s=1.0)))
    assert [a for a in router.plan(0.5) if isinstance(a, Abort)] == []
    (abort,) = [a for a in router.plan(1.0) if isinstance(a, Abort)]
    assert abort.request is late
    assert abort.ttft_s >= 1.0
    router.end(late, S.FAILED)
    only.raise_submit_limit(2)
    assert router.plan(1.1) == []
    router.check_integrity()


def test_nothing_is_aborted_that_an_idle_worker_could_take() -> None:
    router = dispatcher(admission="early-abort")
    router.attach(worker())
    asked = arrive(router, request(slo=Slo(ttft_s=1e-6)))
    assert sent(router, 5.0) == [asked]


def test_an_overload_lasts_as_long_as_a_request_may_wait() -> None:
    admission, asked = EarlyAbort(), request(slo=Slo(ttft_s=2.0))
    assert admission.arrived(asked, 1.0, 0.0)
    assert not admission.is_overloaded(0.0)
    assert admission.arrived(asked, 1.9, 10.0)
    assert admission.is_overloaded(11.9)
    assert not admission.is_overloaded(12.0)
    assert not EarlyAbort(refuse=True).arrived(asked, 2.1, 0.0)


def test_as_much_of_an_objective_is_kept_back_as_leaves_few_late() -> None:
    policy = EarlyAbort()
    asked = request(slo=Slo(ttft_s=1.0))
    assert policy.latest_start_s(asked, 0.1) == pytest.approx(0.9)
    for _ in range(3):
        policy.began(asked, 0.91)
    assert policy.latest_start_s(asked, 0.1) == pytest.approx(0.9 - 3 * MORE_KEPT_BACK)
    for _ in range(1000):
        policy.began(asked, 0.91)
    assert policy.latest_start_s(asked, 0.1) == pytest.approx(0.9 - MOST_KEPT_BACK)
    policy.began(request(), 60.0)  # has no objective
    for _ in range(int(MOST_KEPT_BACK / LESS_KEPT_BACK) + 1):
        policy.began(asked, 0.74)
    assert policy.latest_start_s(asked, 0.1) == pytest.approx(0.9)


def test_a_late_first_token_that_was_expected_then_needs_no_more_kept_back() -> None:
    policy, asked = EarlyAbort(), request(slo=Slo(ttft_s=1.0))
    asked.last_submit_s, asked.predicted_service_s = asked.arrival_s + 0.7, 0.15
    policy.began(asked, 0.94)
    assert policy.latest_start_s(asked, 0.1) == pytest.approx(0.9)
    policy.began(asked, 0.96)
    assert policy.latest_start_s(asked, 0.1) == pytest.approx(0.9 - MORE_KEPT_BACK)


def test_what_is_kept_back_is_forgotten_also_if_nobody_is_admitted() -> None:
    policy, asked = EarlyAbort(), request(slo=Slo(ttft_s=1.0))
    policy.planned(0, 0, 1000.0)
    policy.began(asked, 0.91)
    policy.planned(0, 0, 1000.0)
    assert policy.latest_start_s(asked, 0.1) == pytest.approx(0.9 - MORE_KEPT_BACK)
    policy.planned(0, 0, 1000.0 + 20 * KEPT_BACK_MEMORY_S)
    assert policy.latest_start_s(asked, 0.1) == pytest.approx(0.9)


def test_sloras_rule_knows_only_its_constants() -> None:
    asked = request(arrival_s=1.0, slo=Slo(ttft_s=99.0))
    assert SloraAbort().latest_start_s(asked, service_s=3.0) == 6.5


def test_three_times_what_can_be_served_is_aborted_in_time_and_the_rest_is_in_time() -> None:
    fleet = VirtualFleet(
        dispatcher(
            limits=ROOMY, order="deadline", overload_order="sparing", admission="early-abort"
        )
    )
    for number in range(1200):
        slo = Slo(ttft_s=1.0)
        fleet.arrive(request(arrival_s=number / 200, num_prompt_tokens=100, slo=slo))
    fleet.run(20.0)
    finished, aborted = fleet.ended.finished, fleet.ended.aborted
    assert len(finished) + len(aborted) == 1200
    assert sum(fleet.ended.ttft_s(r) <= 1.0 for r in finished) >= 0.95 * len(finished) > 300
    assert all(now_s <= r.arrival_s + 1.1 for r, (now_s, _) in aborted.items())
    assert not {s.request for s in fleet.submits} & set(aborted)
