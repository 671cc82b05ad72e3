"""Virtual token counters: alone, and on the clock of workers that compute nothing."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.router.fairness import Counters, TokenCounters
from lorry.router.queue import Queue
from lorry.router.request import RequestState
from tests.support.router_requests import ROOMY, dispatcher, request
from tests.support.virtual_workers import VirtualFleet

S = RequestState


def fair(weights: dict[str, float] | None = None, quantum_tokens: int = 1) -> TokenCounters:
    return TokenCounters(
        weight=lambda tenant: (weights or {}).get(tenant, 1.0),
        by_adapter=True,
        quantum_tokens=quantum_tokens,
    )


def test_the_least_served_comes_first_by_weight_and_output_counts_twice() -> None:
    counters = fair({"b": 2.0})
    a, b = Queue("a", b"v"), Queue("b", b"v")
    for queue in (a, b):
        counters.enter(queue)
    counters.charge(a, prompt_tokens=10, output_tokens=5)
    counters.charge(b, prompt_tokens=30, output_tokens=0)
    assert (counters.tenant_rank("a"), counters.tenant_rank("b")) == (20, 15)
    assert counters.share("b") == pytest.approx(2 / 3)


def test_who_comes_back_has_saved_nothing_up() -> None:
    counters = Counters[str](lambda flow: 1.0)
    counters.enter("busy")
    counters.charge("busy", 1000)
    counters.enter("back")
    assert counters.values["back"] == 1000
    counters.leave("back")
    counters.charge("busy", 500)
    counters.charge("back", 2000)
    counters.enter("back")
    assert counters.values["back"] == 3000  # and is forgiven nothing


def test_the_first_one_after_a_pause_starts_where_the_last_one_left() -> None:
    counters = Counters[str](lambda flow: 1.0)
    counters.enter("a")
    counters.charge("a", 700)
    counters.leave("a")
    counters.enter("b")
    assert counters.values["b"] == 700


def test_counters_of_those_that_are_gone_are_forgotten() -> None:
    counters = Counters[int](lambda flow: 1.0)
    for flow in range(5000):
        counters.enter(flow)
        counters.charge(flow, 10)
        counters.leave(flow)
    assert len(counters.values) < 3000


def test_adapters_within_a_quantum_are_equals() -> None:
    counters = fair(quantum_tokens=100)
    u, v = Queue("a", b"u"), Queue("a", b"v")
    counters.enter(u)
    counters.enter(v)
    counters.charge(u, prompt_tokens=99, output_tokens=0)
    assert counters.queue_rank(u) == counters.queue_rank(v)
    counters.charge(u, prompt_tokens=1, output_tokens=0)
    assert counters.queue_rank(u) > counters.queue_rank(v)


def served(fleet: VirtualFleet, *, by_version: bool = False) -> Counter[str | bytes]:
    """Tokens of service, by tenant or by version."""
    tokens = Counter[str | bytes]()
    for submit in fleet.submits:
        asked = submit.request
        flow = asked.version if by_version else asked.tenant
        tokens[flow] += len(asked.prompt_ids) + 2 * len(asked.output_ids)
    return tokens


def test_backlogged_tenants_are_served_by_their_weights() -> None:
    weights = {"one": 1.0, "three": 3.0}
    fleet = VirtualFleet(
        dispatcher(limits=ROOMY, fairness="adapters", weight=weights.__getitem__), max_running=16
    )
    for number in range(900):
        size = 40 + 37 * number % 120
        fleet.arrive(request(tenant="one", num_prompt_tokens=size, max_tokens=20))
        fleet.arrive(request(tenant="three", version=b"v", num_prompt_tokens=200 - size))
    fleet.run(1.0)  # until both wait
    before = served(fleet)
    fleet.run(8.0)
    tokens = served(fleet) - before
    assert tokens["three"] / tokens["one"] == pytest.approx(3.0, rel=0.05)
    assert min(tokens.values()) > 5000


def test_a_tenants_adapters_and_its_base_model_are_served_alike() -> None:
    fleet = VirtualFleet(dispatcher(limits=ROOMY, fairness="adapters"), max_running=16)
    for number in range(600):
        for version in (b"", b"u", b"v", b"v", b"v"):
            fleet.arrive(request(version=version, num_prompt_tokens=50 + 31 * number % 60))
    fleet.run(8.0)
    tokens = served(fleet, by_version=True)
    assert max(tokens.values()) - min(tokens.values()) < 0.05 * max(tokens.values())


def ttft_p99_s(fleet: VirtualFleet, tenant: str) -> float:
    times = sorted(fleet.ended.ttft_s(r) for r in fleet.ended.finished if r.tenant == tenant)
    return times[int(0.99 * (len(times) - 1))]


def test_a_greedy_tenant_hardly_delays_another() -> None:
    p99_s = []
    for greed in (20, 100):
        fleet = VirtualFleet(dispatcher(limits=ROOMY, fairness="adapters"), max_running=16)
        for number in range(60):
            fleet.arrive(request(tenant="modest", arrival_s=0.1 * number, num_prompt_tokens=100))
        for number in range(60 * greed):
            arrival_s = 6.0 / (60 * greed) * number
            fleet.arrive(request(tenant="greedy", arrival_s=arrival_s, num_prompt_tokens=100))
        fleet.run(8.0)
        p99_s.append(ttft_p99_s(fleet, "modest"))
    assert p99_s[1] < 1.2 * p99_s[0]


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=30, max_size=60),
    order=st.sampled_from(["arrival", "newest", "deadline", "sparing"]),
)
def test_while_two_tenants_wait_their_service_differs_by_no_more_than_vtc_allows(
    sizes: list[int], order: str
) -> None:
    """Twice what one pick and the output of all that run can be, as the paper proves."""
    fleet = VirtualFleet(
        dispatcher(limits=ROOMY, fairness="tenants", order=order), max_running=4, step_tokens=64
    )
    for number, size in enumerate(sizes):
        for tenant in ("a", "b"):
            num_tokens = size if tenant == "a" else 301 - size
            fleet.arrive(
                request(tenant=tenant, num_prompt_tokens=num_tokens, max_tokens=5 + number % 7)
            )
    bound = 2 * (300 + 2 * 12 * 4)
    fleet.run(0.0)
    before = served(fleet)
    for step in range(1, 60):
        fleet.run(0.05 * step)
        if {r.tenant for r in fleet.dispatcher.requests if r.state is S.QUEUED} < {"a", "b"}:
            break
        tokens = served(fleet)
        assert abs((tokens["a"] - before["a"]) - (tokens["b"] - before["b"])) <= bound
