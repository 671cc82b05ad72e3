"""Requests, workers and dispatchers of the router, built in one line."""

import itertools
from collections.abc import Callable
from typing import Any

from lorry.router.dispatcher import Dispatcher
from lorry.router.generation import Generation
from lorry.router.places import Amount, Places
from lorry.router.policies import make_policies
from lorry.router.policy_options import PolicyOptions
from lorry.router.rates import RateLimits
from lorry.router.request import Request
from lorry.router.slo import NO_SLO, Slo
from lorry.router.worker import Worker

PLAIN: dict[str, Any] = {
    "order": "arrival",
    "overload_order": "arrival",
    "admission": "all",
    "fairness": "none",
    "fairness_quantum_tokens": 1,
    "cluster_adapters": 0,
    "placement_imbalance": 2,
}
ROOMY = {
    "max_requests": 1 << 30,
    "max_requests_per_tenant": 1 << 30,
    "max_tokens": 1 << 50,
    "max_tokens_per_tenant": 1 << 50,
}
_ids = itertools.count()


def request(
    request_id: str = "",
    *,
    tenant: str = "default",
    version: bytes = b"",
    rank: int = 0,
    num_prompt_tokens: int = 4,
    max_tokens: int = 10,
    arrival_s: float = 0.0,
    slo: Slo = NO_SLO,
    **generation: Any,
) -> Request:
    asked = Generation(
        request_id=request_id or f"r{next(_ids)}",
        tenant=tenant,
        adapter=None,
        prompt="",
        max_tokens=max_tokens,
        **generation,
    )
    built = Request(asked, seed=0, arrival_s=arrival_s, deadline_s=arrival_s + 100.0, slo=slo)
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


def places(
    *,
    max_requests: int = 100,
    max_requests_per_tenant: int = 100,
    max_tokens: int = 1000,
    max_tokens_per_tenant: int = 1000,
) -> Places:
    return Places(
        limit=Amount(max_requests, max_tokens),
        tenant_limit=lambda tenant: Amount(max_requests_per_tenant, max_tokens_per_tenant),
    )


def dispatcher(
    *,
    max_prefetch: int = 8,
    weight: Callable[[str], float] = lambda tenant: 1.0,
    limits: dict[str, int] | None = None,
    rates: RateLimits | None = None,
    **options: Any,
) -> Dispatcher:
    """By first come, first served; `options` are those of the policies."""
    policies = make_policies(PolicyOptions(**(PLAIN | options)), weight=weight)
    held = places(**(limits or {}))
    return Dispatcher(held, policies, max_prefetch=max_prefetch, rates=rates)
