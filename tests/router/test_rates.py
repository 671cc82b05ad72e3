from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.router.rates import RateLimits, Rates, unlimited
from lorry.router.request import RequestState
from lorry.rpc.errors import DuplicateRequest, TenantLimit
from tests.support.router_requests import dispatcher, request, worker


def limits(
    requests_per_s: float | None = None, tokens_per_s: float | None = None, *, burst_s: float = 2.0
) -> RateLimits:
    return RateLimits(lambda tenant: Rates(requests_per_s, tokens_per_s), burst_s=burst_s)


def send(rates: RateLimits, tenant: str, now_s: float) -> float | None:
    """Seconds to wait if it is refused."""
    try:
        rates.check(tenant, now_s)
    except TenantLimit as error:
        return error.retry_after_s
    rates.count_request(tenant)
    return None


def test_without_a_rate_nothing_is_refused() -> None:
    rates = unlimited()
    assert {send(rates, "a", 0.0) for _ in range(1000)} == {None}
    rates.count_tokens("a", 1 << 40)
    assert send(rates, "a", 0.0) is None


def test_a_burst_may_come_at_once_and_then_the_rate() -> None:
    rates = limits(requests_per_s=5)
    assert [send(rates, "a", 0.0) for _ in range(10)] == [None] * 10
    assert send(rates, "a", 0.0) == pytest.approx(0.2)
    assert send(rates, "a", 0.1) == pytest.approx(0.1)
    assert send(rates, "a", 0.2) is None
    assert send(rates, "a", 0.2) == pytest.approx(0.2)


def test_a_tenant_leaves_the_others_alone() -> None:
    rates = limits(requests_per_s=1, burst_s=1)
    assert send(rates, "a", 0.0) is None
    assert send(rates, "a", 0.0) is not None
    assert send(rates, "b", 0.0) is None


def test_a_rate_below_one_lets_one_request_pass_now_and_then() -> None:
    rates = limits(requests_per_s=0.1, burst_s=1)
    assert send(rates, "a", 0.0) is None
    assert send(rates, "a", 9.0) == pytest.approx(1.0)
    assert send(rates, "a", 10.0) is None


def test_tokens_may_be_owed_and_are_paid_back_at_their_rate() -> None:
    rates = limits(tokens_per_s=100)
    assert send(rates, "a", 0.0) is None
    rates.count_tokens("a", 700)  # 500 more than a burst holds
    assert send(rates, "a", 0.0) == pytest.approx(5.01)
    assert send(rates, "a", 5.0) == pytest.approx(0.01)
    assert send(rates, "a", 5.02) is None


@given(
    gaps_s=st.lists(st.floats(0.0, 3.0), max_size=60),
    per_s=st.floats(0.1, 50.0),
    burst_s=st.floats(0.1, 5.0),
)
def test_over_any_time_no_more_pass_than_burst_and_rate_and_a_hint_is_right(
    gaps_s: list[float], per_s: float, burst_s: float
) -> None:
    rates, now_s, passed = limits(requests_per_s=per_s, burst_s=burst_s), 0.0, 0
    for gap_s in gaps_s:
        now_s += gap_s
        wait_s = send(rates, "a", now_s)
        passed += wait_s is None
        if wait_s is not None:
            assert wait_s <= 1 / per_s + 1e-6
            rates.check("a", now_s + wait_s)
            now_s += wait_s
        assert passed <= max(1.0, per_s * burst_s) + per_s * now_s + 1e-3


def refused(call: Callable[[], None], unit: str) -> None:
    with pytest.raises(TenantLimit, match=f"{unit} a second") as refusal:
        call()
    assert refusal.value.retry_after_s is not None
    assert refusal.value.metadata["tenant"] == "a"


def test_the_dispatcher_counts_prompts_and_outputs_once() -> None:
    rates = limits(tokens_per_s=10)
    router, only = dispatcher(rates=rates), worker()
    router.attach(only)
    asked = request(tenant="a")
    router.receive(asked)
    router.enqueue(asked, 0.0)
    router.plan(0.0)
    assert rates._tokens["a"].level == 20 - len(asked.prompt_ids)
    router.requeue(asked)
    router.plan(0.0)
    asked.output_ids.extend([1] * 50)
    router.end(asked, RequestState.CANCELLED)
    assert rates._tokens["a"].level == 20 - len(asked.prompt_ids) - 50
    refused(lambda: router.receive(request(tenant="a")), "tokens")
    router.receive(request(tenant="b"))
    router.check_integrity()


def test_what_the_dispatcher_refuses_does_not_count() -> None:
    router = dispatcher(rates=limits(requests_per_s=1, burst_s=2))
    router.attach(worker())
    first = request(tenant="a", request_id="same")
    router.receive(first)
    for _ in range(5):  # a replay of the first
        with pytest.raises(DuplicateRequest):
            router.receive(request(tenant="a", request_id="same"))
    router.receive(request(tenant="a"))
    refused(lambda: router.receive(request(tenant="a")), "requests")
    assert len(router.requests) == 2
    router.check_integrity()
