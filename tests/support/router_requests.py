"""Requests, workers and dispatchers of the router, built in one line."""

import itertools
from typing import Any

from lorry.router.dispatcher import Dispatcher
from lorry.router.generation import Generation
from lorry.router.policies import ArrivalOrder, ResidencyPlacement
from lorry.router.queues import Amount, RequestQueues
from lorry.router.request import Request
from lorry.router.worker import Worker

_ids = itertools.count()


def request(
    request_id: str = "",
    *,
    tenant: str = "default",
    version: bytes = b"",
    rank: int = 0,
    num_prompt_tokens: int = 4,
    max_tokens: int = 10,
    **generation: Any,
) -> Request:
    asked = Generation(
        request_id=request_id or f"r{next(_ids)}",
        tenant=tenant,
        adapter=None,
        prompt="",
        **generation,
    )
    built = Request(asked, seed=0, arrival_s=0.0, deadline_s=100.0)
    built.prompt_ids = [1] * num_prompt_tokens
    built.max_tokens, built.version, built.rank = max_tokens, version, rank
    return built


def worker(name: str = "w1", **fields: Any) -> Worker:
    defaults: dict[str, Any] = {
        "epoch": 1,
        "max_context_tokens": 512,
        "max_rank": 64,
        "submit_limit": 100,
    }
    return Worker(name=name, **(defaults | fields))


def queues(
    *,
    max_requests: int = 100,
    max_requests_per_tenant: int = 100,
    max_tokens: int = 1000,
    max_tokens_per_tenant: int = 1000,
) -> RequestQueues:
    return RequestQueues(
        limit=Amount(max_requests, max_tokens),
        tenant_limit=Amount(max_requests_per_tenant, max_tokens_per_tenant),
    )


def dispatcher(*, max_prefetch: int = 8, imbalance: int = 2, **limits: int) -> Dispatcher:
    placement = ResidencyPlacement(imbalance=imbalance)
    return Dispatcher(queues(**limits), ArrivalOrder(), placement, max_prefetch=max_prefetch)
