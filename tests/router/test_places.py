from dataclasses import replace

import pytest

from lorry.router.request import Request, RequestState
from lorry.rpc.errors import QueueFull, TenantLimit
from tests.support.router_requests import places, request


def queued(waiting, asked: Request) -> Request:
    waiting.take(asked)
    asked.move_to(RequestState.QUEUED)
    waiting.keep(asked)
    waiting.check_integrity()
    return asked


def test_the_limit_of_all_refuses_with_a_hint_when_to_retry() -> None:
    waiting = places(max_requests=2)
    held = [request(tenant=f"t{i}") for i in range(2)]
    for asked in held:
        waiting.take(asked)
    with pytest.raises(QueueFull, match="2 requests") as refusal:
        waiting.take(request(tenant="t3"))
    assert refusal.value.retry_after_s is not None
    waiting.free(held[0])
    waiting.take(request(tenant="t3"))
    waiting.check_integrity()


def test_the_limit_of_a_tenant_leaves_room_for_others() -> None:
    waiting = places(max_requests_per_tenant=1)
    waiting.take(request(tenant="a"))
    with pytest.raises(TenantLimit, match="tenant a") as refusal:
        waiting.take(request(tenant="a"))
    assert refusal.value.retry_after_s is not None
    waiting.take(request(tenant="b"))
    waiting.check_integrity()


def test_freeing_twice_frees_once() -> None:
    waiting = places()
    asked = queued(waiting, request())
    queued(waiting, request())
    waiting.free(asked)
    waiting.free(asked)
    waiting.check_integrity()
    assert len(waiting) == 1


def unread(prompt: str, tenant: str = "default") -> Request:
    """Received and not tokenized yet."""
    asked = request(tenant=tenant, num_prompt_tokens=0)
    asked.generation = replace(asked.generation, prompt=prompt)
    return asked


def test_the_tokens_of_all_are_limited() -> None:
    waiting = places(max_tokens=10)
    waiting.take(request(tenant="a", num_prompt_tokens=6))
    with pytest.raises(QueueFull, match="10 prompt tokens") as refusal:
        waiting.take(request(tenant="b", num_prompt_tokens=5))
    assert refusal.value.retry_after_s is not None
    assert refusal.value.metadata["maxQueuedTokens"] == "10"
    waiting.take(request(tenant="b", num_prompt_tokens=4))
    waiting.check_integrity()


def test_the_tokens_of_a_tenant_are_limited() -> None:
    waiting = places(max_tokens_per_tenant=10)
    first = request(tenant="a", num_prompt_tokens=10)
    waiting.take(first)
    with pytest.raises(TenantLimit, match="10 prompt tokens of tenant a"):
        waiting.take(request(tenant="a", num_prompt_tokens=1))
    waiting.take(request(tenant="b", num_prompt_tokens=10))
    waiting.free(first)
    waiting.take(request(tenant="a", num_prompt_tokens=1))
    waiting.check_integrity()


def test_a_prompt_counts_by_its_bytes_until_it_is_tokenized() -> None:
    waiting = places(max_tokens=10)
    first = unread("\u00e9" * 4)
    waiting.take(first)
    with pytest.raises(QueueFull):
        waiting.take(unread("abc"))
    first.prompt_ids = [1, 2]
    first.move_to(RequestState.QUEUED)
    waiting.keep(first)
    waiting.take(unread("abc"))
    waiting.check_integrity()


def test_a_large_prompt_may_wait_alone() -> None:
    waiting = places(max_tokens=10, max_tokens_per_tenant=10)
    waiting.take(request(num_prompt_tokens=99))
    with pytest.raises(QueueFull):
        waiting.take(request(num_prompt_tokens=1))
    waiting.check_integrity()


def test_what_comes_back_is_never_refused() -> None:
    waiting = places(max_requests=1, max_tokens=10)
    first = queued(waiting, request(num_prompt_tokens=10))
    waiting.free(first)
    queued(waiting, request(num_prompt_tokens=10))
    waiting.keep(first)
    waiting.check_integrity()
    assert len(waiting) == 2
