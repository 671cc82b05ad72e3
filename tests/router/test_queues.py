import pytest

from lorry.router.queues import QueueKey
from lorry.router.request import Request, RequestState
from lorry.rpc.errors import QueueFull, TenantLimit
from tests.support.router_requests import queues, request


def queued(waiting, asked: Request) -> Request:
    waiting.take_place(asked)
    asked.move_to(RequestState.QUEUED)
    waiting.add(asked)
    waiting.check_integrity()
    return asked


def test_each_adapter_of_each_tenant_has_its_queue_in_arrival_order() -> None:
    waiting = queues()
    first, second = (queued(waiting, request(tenant="a", version=b"v")) for _ in range(2))
    third = queued(waiting, request(tenant="b", version=b"v"))
    assert list(waiting.queues) == [QueueKey("a", b"v"), QueueKey("b", b"v")]
    assert list(waiting.queues[QueueKey("a", b"v")].values()) == [first, second]
    assert list(waiting.arrivals.values()) == [first, second, third]


def test_a_request_that_comes_back_takes_its_old_turn() -> None:
    waiting = queues()
    first, second = (queued(waiting, request(version=b"v")) for _ in range(2))
    waiting.remove(first)
    first.state = RequestState.SUBMITTED
    first.move_to(RequestState.QUEUED)
    waiting.add(first)
    waiting.check_integrity()
    assert list(waiting.arrivals.values()) == [first, second]
    assert list(waiting.queues[QueueKey("default", b"v")].values()) == [first, second]


def test_the_limit_of_all_refuses_with_a_hint_when_to_retry() -> None:
    waiting = queues(max_requests=2)
    held = [request(tenant=f"t{i}") for i in range(2)]
    for asked in held:
        waiting.take_place(asked)
    with pytest.raises(QueueFull, match="2 requests") as refusal:
        waiting.take_place(request(tenant="t3"))
    assert refusal.value.retry_after_s is not None
    waiting.remove(held[0])
    waiting.take_place(request(tenant="t3"))
    waiting.check_integrity()


def test_the_limit_of_a_tenant_leaves_room_for_others() -> None:
    waiting = queues(max_requests_per_tenant=1)
    waiting.take_place(request(tenant="a"))
    with pytest.raises(TenantLimit, match="tenant a") as refusal:
        waiting.take_place(request(tenant="a"))
    assert refusal.value.retry_after_s is not None
    waiting.take_place(request(tenant="b"))
    waiting.check_integrity()


def test_removing_twice_frees_once() -> None:
    waiting = queues()
    asked = queued(waiting, request())
    queued(waiting, request())
    waiting.remove(asked)
    waiting.remove(asked)
    waiting.check_integrity()
    assert len(waiting) == 1
