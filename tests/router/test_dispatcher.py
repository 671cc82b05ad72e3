"""The dispatcher alone: no event loop, no clock."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorry.router.actions import Prefetch, Submit
from lorry.router.dispatcher import MAX_RESUBMITS, Dispatcher, Place
from lorry.router.request import AT_WORKER, Request, RequestState
from lorry.router.slo import Slo
from lorry.rpc.errors import (
    AdapterIncompatible,
    ContextLengthExceeded,
    Draining,
    DuplicateRequest,
    LorryError,
    NoWorker,
)
from tests.support.router_requests import dispatcher, request, worker

S = RequestState


def arrive(router: Dispatcher, asked: Request) -> Request:
    router.receive(asked)
    router.enqueue(asked, 0.0)
    return asked


def submits(router: Dispatcher) -> list[Submit]:
    return [action for action in router.plan(0.0) if isinstance(action, Submit)]


def prefetches(router: Dispatcher, now_s: float = 0.0) -> list[tuple[str, tuple[bytes, ...]]]:
    plan = router.plan(now_s)
    return [(a.worker.name, a.versions) for a in plan if isinstance(a, Prefetch)]


def test_requests_are_submitted_in_arrival_order_within_the_limit() -> None:
    router, only = dispatcher(), worker(submit_limit=2)
    router.attach(only)
    asked = [arrive(router, request(version=v)) for v in (b"a", b"b", b"c")]
    assert [(s.seq, s.request) for s in submits(router)] == [(1, asked[0]), (2, asked[1])]
    assert asked[2].state is S.QUEUED
    only.raise_submit_limit(3)
    assert [(s.seq, s.request) for s in submits(router)] == [(3, asked[2])]
    router.check_integrity()


def test_ends_without_a_higher_limit_let_nothing_more_go() -> None:
    router, only = dispatcher(), worker(submit_limit=1)
    router.attach(only)
    first, second = arrive(router, request()), arrive(router, request())
    submits(router)
    router.end(first, S.FINISHED)
    assert submits(router) == []
    assert second.state is S.QUEUED


def test_waiting_versions_are_prefetched_most_urgent_first_and_once() -> None:
    router, only = dispatcher(), worker(submit_limit=1)
    router.attach(only)
    for version in (b"a", b"b", b"c", b"b", b""):
        arrive(router, request(version=version))
    assert prefetches(router) == [("w1", (b"b", b"c"))]
    assert prefetches(router, 1.0) == []
    only.raise_submit_limit(2)
    assert prefetches(router, 1.0) == []  # so soon nothing is ranked again
    next_s = router.next_plan_s
    assert next_s is not None
    assert next_s < 1.2
    assert prefetches(router, next_s) == [("w1", (b"c", b"b"))]
    only.raise_submit_limit(10)
    assert prefetches(router, 3.0) == [("w1", ())]


def test_no_more_versions_are_prefetched_than_configured() -> None:
    router = dispatcher(max_prefetch=2)
    router.attach(worker(submit_limit=0))
    for index in range(5):
        arrive(router, request(version=bytes([index])))
    assert prefetches(router) == [("w1", (b"\x00", b"\x01"))]


def test_a_request_joins_the_worker_that_holds_its_adapter() -> None:
    router = dispatcher()
    router.attach(worker("w1"))
    router.attach(worker("w2", gpu={b"v"}))
    arrive(router, request(version=b"v"))
    assert [submit.worker.name for submit in submits(router)] == ["w2"]


def test_a_full_worker_is_passed_over() -> None:
    router = dispatcher()
    router.attach(worker("w1", gpu={b"v"}, submit_limit=0))
    router.attach(worker("w2"))
    arrive(router, request(version=b"v"))
    assert [submit.worker.name for submit in submits(router)] == ["w2"]


def test_who_has_left_is_not_held_until_its_objective_would_have_passed() -> None:
    router = dispatcher(admission="early-abort")
    router.attach(worker(submit_limit=0))
    slo = Slo(ttft_s=3600.0)
    stays = arrive(router, request(slo=slo))
    for _ in range(300):
        router.end(arrive(router, request(slo=slo)), S.CANCELLED)
        router.check_integrity()
    held = router._planner._latest_starts
    assert len(held) < 100
    queued = [arrive(router, request(slo=slo)) for _ in range(90)]
    for left in queued:
        router.end(left, S.CANCELLED)
        router.check_integrity()
    assert len(held) < 100
    assert stays in {start[2] for start in held}, "it is looked at again"


def test_without_a_worker_arrivals_are_refused() -> None:
    router = dispatcher()
    with pytest.raises(NoWorker) as refusal:
        router.receive(request())
    assert refusal.value.retry_after_s is not None
    router.attach(worker(draining=True))
    with pytest.raises(NoWorker):
        router.receive(request())


def test_a_draining_router_refuses_arrivals() -> None:
    router = dispatcher()
    router.attach(worker())
    router.draining = True
    with pytest.raises(Draining) as refusal:
        router.receive(request())
    assert refusal.value.retry_after_s is not None


def test_an_active_request_id_is_refused_within_its_tenant_only() -> None:
    router = dispatcher()
    router.attach(worker())
    first = arrive(router, request("same", tenant="a"))
    with pytest.raises(DuplicateRequest, match="same"):
        router.receive(request("same", tenant="a"))
    arrive(router, request("same", tenant="b"))
    router.end(first, S.CANCELLED)
    arrive(router, request("same", tenant="a"))
    router.check_integrity()


def test_a_rank_that_no_worker_serves_is_refused() -> None:
    router, asked = dispatcher(), request(rank=65, version=b"v")
    router.attach(worker(max_rank=64))
    router.receive(asked)
    with pytest.raises(AdapterIncompatible, match=r"rank 65.*at most 64"):
        router.enqueue(asked, 0.0)
    router.end(asked, S.FAILED)
    router.check_integrity()


def test_a_context_that_no_worker_serves_is_refused() -> None:
    router, asked = dispatcher(), request(num_prompt_tokens=100, max_tokens=29)
    router.attach(worker(max_context_tokens=128))
    router.receive(asked)
    with pytest.raises(ContextLengthExceeded, match="100 prompt tokens and 29 output tokens"):
        router.enqueue(asked, 0.0)


def test_a_cancel_is_due_only_where_a_worker_has_the_request() -> None:
    router = dispatcher()
    router.attach(worker(submit_limit=1))
    first, second = arrive(router, request()), arrive(router, request())
    submits(router)
    assert router.end(first, S.CANCELLED) == Place("w1", 1)
    assert router.end(second, S.CANCELLED) is None
    router.check_integrity()


def test_a_finished_request_needs_no_cancel() -> None:
    router = dispatcher()
    router.attach(worker())
    asked = arrive(router, request())
    submits(router)
    assert router.end(asked, S.FINISHED) is None


def test_requests_of_a_lost_worker_go_to_another_in_their_old_turn() -> None:
    router, first = dispatcher(), worker("w1", submit_limit=1)
    router.attach(first)
    asked, later = arrive(router, request()), arrive(router, request())
    submits(router)
    asked.output_ids += [5, 6]
    router.drew(asked, 0.0)
    assert router.lose(first) == []
    router.attach(worker("w2"))
    router.check_integrity()
    assert [(s.worker.name, s.request) for s in submits(router)] == [("w2", asked), ("w2", later)]
    assert asked.output_ids == [5, 6]


def test_a_request_survives_two_losses_and_no_more() -> None:
    router, asked = dispatcher(), request()
    router.attach(worker("w0"))
    arrive(router, asked)
    for turn in range(MAX_RESUBMITS + 1):
        (submit,) = submits(router)
        lost = router.lose(submit.worker)
        assert lost == ([] if turn < MAX_RESUBMITS else [asked])
        router.attach(worker(f"w{turn + 1}"))
    router.end(asked, S.FAILED)
    router.check_integrity()


def test_what_a_draining_worker_gives_back_is_no_loss() -> None:
    router, asked = dispatcher(), request()
    for turn in range(MAX_RESUBMITS + 2):
        router.attach(worker(f"w{turn}"))
    arrive(router, asked)
    for _ in range(MAX_RESUBMITS + 1):
        (submit,) = submits(router)
        submit.worker.draining = True
        assert router.requeue(asked, lost=False)
    (submit,) = submits(router)
    assert router.lose(submit.worker) == []
    router.check_integrity()


def test_a_worker_that_is_not_listed_gets_nothing_new() -> None:
    router, only = dispatcher(), worker()
    router.attach(only)
    asked = arrive(router, request())
    only.listed = False
    assert submits(router) == []
    assert router.stranded() == [asked]
    with pytest.raises(NoWorker):
        router.receive(request())
    only.listed = True
    assert [submit.request for submit in submits(router)] == [asked]


@pytest.mark.parametrize("output_ids", [[7, 7, 7], [9]], ids=["max_tokens", "stop token"])
def test_a_complete_output_is_not_resubmitted(output_ids: list[int]) -> None:
    router, only = dispatcher(), worker()
    router.attach(only)
    asked = arrive(router, request(max_tokens=3, stop_token_ids=frozenset({9})))
    submits(router)
    asked.output_ids += output_ids
    router.drew(asked, 0.0)
    assert router.lose(only) == [asked]


def test_requests_that_no_worker_can_serve_any_more_are_stranded() -> None:
    router, large, small = dispatcher(), worker("w1"), worker("w2", max_rank=8)
    router.attach(large)
    router.attach(small)
    asked = arrive(router, request(rank=16, version=b"v"))
    other = arrive(router, request(rank=8, version=b"u"))
    assert router.stranded() == []
    router.lose(large)
    assert router.stranded() == [asked]
    small.draining = True
    assert router.stranded() == [asked, other]


class Lifecycles(RuleBasedStateMachine):
    """Any order of events leaves every request in one place and never exceeds a limit."""

    def __init__(self) -> None:
        super().__init__()
        self.router = dispatcher(limits={"max_requests": 6, "max_requests_per_tenant": 4})
        self.num_workers = 0

    @property
    def at_workers(self) -> list[Request]:
        return [r for r in self.router.requests if r.state in AT_WORKER]

    @rule(limit=st.integers(0, 4), rank=st.sampled_from([8, 64]))
    def attach(self, limit: int, rank: int) -> None:
        self.num_workers += 1
        self.router.attach(worker(f"w{self.num_workers}", submit_limit=limit, max_rank=rank))

    @precondition(lambda self: self.router.workers)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        lost = data.draw(st.sampled_from(self.router.workers))
        for asked in self.router.lose(lost):
            self.router.end(asked, S.FAILED)

    @precondition(lambda self: self.router.workers)
    @rule(data=st.data(), more=st.integers(0, 3))
    def raise_limit(self, data: st.DataObject, more: int) -> None:
        raised = data.draw(st.sampled_from(self.router.workers))
        raised.raise_submit_limit(raised.num_submitted + more)

    @rule(
        tenant=st.sampled_from("ab"),
        version=st.sampled_from([b"", b"u", b"v"]),
        rank=st.sampled_from([8, 16, 99]),
    )
    def arrive(self, tenant: str, version: bytes, rank: int) -> None:
        asked = request(tenant=tenant, version=version, rank=rank if version else 0, max_tokens=3)
        try:
            self.router.receive(asked)
        except LorryError:
            return
        try:
            self.router.enqueue(asked, 0.0)
        except LorryError:
            self.router.end(asked, S.FAILED)

    @rule()
    def plan(self) -> None:
        for action in self.router.plan(0.0):
            if isinstance(action, Submit):
                assert action.worker.num_submitted <= action.worker.submit_limit
                assert action.worker.can_serve(action.request)

    @precondition(lambda self: self.at_workers)
    @rule(data=st.data())
    def draw(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.at_workers))
        if not asked.output_complete:
            asked.output_ids.append(5)
            self.router.drew(asked, 0.0)

    @precondition(lambda self: self.router.requests)
    @rule(data=st.data(), state=st.sampled_from([S.FAILED, S.CANCELLED]))
    def end(self, data: st.DataObject, state: RequestState) -> None:
        asked = data.draw(st.sampled_from(self.router.requests))
        place = self.router.end(asked, state)
        assert asked not in self.router.requests
        assert place is None or place.worker_name in {w.name for w in self.router.workers}

    @invariant()
    def everything_is_in_one_place(self) -> None:
        self.router.check_integrity()


Lifecycles.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLifecycles = Lifecycles.TestCase
