"""What is kept at a worker for tenants that have less than their fair share of it."""

from collections import Counter
from typing import Any

import pytest

from lorry.router.actions import Submit
from lorry.router.dispatcher import Dispatcher
from lorry.router.request import RequestState
from lorry.router.reserve import MEMORY_S, ShareReserve
from lorry.router.worker import Worker, WorkerStatus
from tests.support.router_requests import ROOMY, dispatcher, request, worker

PLACES = 16
KEPT = 2 / PLACES


def fair(attached: Worker, **options: Any) -> Dispatcher:
    policies: dict[str, Any] = {
        "fairness": "tenants",
        "fairness_reserve": KEPT,
        "worker_backlog_s": 0.0,
    }
    built = dispatcher(limits=ROOMY, **(policies | options))
    built.attach(attached)
    return built


def send(router: Dispatcher, tenant: str, count: int, now_s: float = 0.0, **fields: Any) -> None:
    for _ in range(count):
        one = request(tenant=tenant, arrival_s=now_s, **fields)
        router.receive(one)
        router.enqueue(one, now_s)


def submitted(router: Dispatcher, now_s: float = 0.0) -> Counter[str]:
    """Requests that a plan sends, by tenant."""
    actions = router.plan(now_s)
    router.check_integrity()
    return Counter(action.request.tenant for action in actions if isinstance(action, Submit))


def end_one(router: Dispatcher, only: Worker, tenant: str) -> None:
    one = next(r for r in only.active.values() if r.tenant == tenant)
    router.drew(one, 0.0)
    router.end(one, RequestState.FINISHED)


def test_places_are_kept_from_a_tenant_with_more_than_its_share() -> None:
    only = worker(max_running=PLACES)
    router = fair(only)
    send(router, "modest", 1)
    send(router, "greedy", 100)
    assert submitted(router) == {"modest": 1, "greedy": 13}
    send(router, "modest", 1)
    assert submitted(router) == {"modest": 1}
    end_one(router, only, "greedy")
    assert submitted(router) == {}  # the modest one's place is free again before it is needed
    end_one(router, only, "greedy")
    assert submitted(router) == {"greedy": 1}


def test_a_tenant_alone_fills_the_worker() -> None:
    only = worker(max_running=PLACES, submit_limit=PLACES)
    router = fair(only)
    send(router, "greedy", 100)
    assert submitted(router) == {"greedy": PLACES}


def test_a_tenant_that_was_not_seen_for_a_while_is_kept_nothing() -> None:
    only = worker(max_running=PLACES, submit_limit=PLACES)
    router = fair(only)
    send(router, "modest", 1)
    send(router, "greedy", 100)
    assert submitted(router)["greedy"] == 13
    later_s = 1.1 * MEMORY_S
    send(router, "greedy", 1, later_s)
    assert submitted(router, later_s) == {"greedy": 2}


def test_without_fairness_or_reserve_the_worker_is_filled() -> None:
    choices: list[dict[str, Any]] = [{"fairness": "none"}, {"fairness_reserve": 0.0}]
    for options in choices:
        only = worker(max_running=PLACES, submit_limit=PLACES)
        router = fair(only, **options)
        send(router, "modest", 1)
        send(router, "greedy", 100)
        assert submitted(router).total() == PLACES


def test_pages_are_kept_as_the_worker_tells_them() -> None:
    only = worker()
    router = fair(only)
    # 100 pages, of which other routers' requests and adapters in use have 30.
    only.hear(
        WorkerStatus(
            pages_total=100,
            pages_free=40,
            pages_cached=10,
            pages_adapter=25,
            pages_adapter_idle=20,
        )
    )
    send(router, "modest", 1, num_prompt_tokens=16)
    send(router, "greedy", 100, num_prompt_tokens=32)
    assert submitted(router) == {"modest": 1, "greedy": 29}  # 30 + 1 + 2 * 29 pages of 87.5
    send(router, "modest", 1, num_prompt_tokens=16)
    assert submitted(router) == {"modest": 1}


def test_prompts_of_no_more_than_a_part_of_a_step_queue_there() -> None:
    only = worker(step_tokens=64)
    router = fair(only)
    send(router, "modest", 1, num_prompt_tokens=8)
    assert submitted(router) == {"modest": 1}
    send(router, "greedy", 100, num_prompt_tokens=8)
    assert submitted(router) == {"greedy": 3}  # 8 + 3 * 8 tokens fill a half
    send(router, "modest", 1, num_prompt_tokens=8)
    assert submitted(router) == {"modest": 1}


def test_many_tenants_with_a_request_each_fill_the_worker() -> None:
    only = worker(max_running=PLACES, submit_limit=PLACES)
    router = fair(only)
    for number in range(2 * PLACES):
        send(router, f"t{number}", 1)
    assert submitted(router).total() == PLACES


def test_others_get_no_more_ahead_than_the_quantum_allows() -> None:
    """Whose turn it is waits for a place; those who had theirs do not take what is kept."""
    only = worker(max_running=PLACES, max_context_tokens=2048)
    router = fair(only, fairness_quantum_tokens=100)
    send(router, "greedy", 100, num_prompt_tokens=10)
    send(router, "modest", 1, num_prompt_tokens=10)
    assert submitted(router).total() == PLACES - 2
    send(router, "modest", 1, num_prompt_tokens=1000)
    assert submitted(router) == {"modest": 1}
    send(router, "modest", 1)
    assert submitted(router) == {}
    for _ in range(3):
        end_one(router, only, "greedy")
    assert submitted(router)["greedy"] == 2


def test_fair_shares_are_by_weight() -> None:
    only = worker(max_running=PLACES)
    router = fair(only)
    reserve = ShareReserve(
        kept=KEPT, step_share=0.5, max_lead_tokens=1, weight=lambda t: 3.0 if t == "three" else 1.0
    )
    for tenant in ("one", "three"):
        reserve.arrived(tenant, 0.0)
    send(router, "one", 3)
    send(router, "three", 7)
    submitted(router)
    assert reserve.is_over("one", only)
    assert not reserve.is_over("three", only)
    send(router, "three", 3)
    submitted(router)
    assert reserve.is_over("three", only)
    assert not reserve.is_over("one", only)


def test_a_modest_tenant_is_not_passed_over_for_a_greedy_ones_adapters() -> None:
    only = worker(max_running=PLACES)
    router = fair(only, cluster_adapters=1, cluster_wait_s=60.0)
    send(router, "modest", 1)  # of the base model
    send(router, "greedy", 100, version=b"hers")
    assert submitted(router) == {"modest": 1, "greedy": 13}
    send(router, "modest", 1, version=b"his")
    assert submitted(router) == {"modest": 1}


def test_prompts_of_a_greedy_tenant_leave_others_half_of_the_next_step() -> None:
    only = worker(max_running=100, step_tokens=100)
    router = fair(only, fairness_step_share=0.5, fairness_quantum_tokens=1000)
    send(router, "modest", 1, num_prompt_tokens=10)
    send(router, "greedy", 100, num_prompt_tokens=10)
    assert submitted(router) == {"modest": 1, "greedy": 4}
    send(router, "modest", 3, num_prompt_tokens=10)
    assert submitted(router) == {"modest": 3}


def test_where_a_greedy_tenants_prompts_fill_the_queue_others_have_as_much_again() -> None:
    status = WorkerStatus(prefill_tokens_per_s=1000.0)
    only = worker(max_running=100, step_tokens=1000, status=status)
    router = fair(  # room for 100 tokens
        only, worker_backlog_s=0.1, fairness_step_share=0.5, fairness_quantum_tokens=1000
    )
    send(router, "modest", 1, num_prompt_tokens=10)
    send(router, "greedy", 100, num_prompt_tokens=30)
    assert submitted(router) == {"modest": 1, "greedy": 2}
    send(router, "modest", 2, num_prompt_tokens=60)
    assert submitted(router) == {"modest": 2}


@pytest.mark.parametrize("share", [1.0, 1.5])
def test_a_reserve_of_everything_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"fairness_reserve must be below 1, got {share}"):
        dispatcher(fairness_reserve=share)
