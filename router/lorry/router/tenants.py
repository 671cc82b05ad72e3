"""What the deployment grants each tenant: a weight, limits and default objectives.

The file is JSON, ``{"tenants": {ID: {"weight": 3, "max_queued_requests": 100,
"max_queued_tokens": 100000, "requests_per_s": 10, "tokens_per_s": 5000, "slo_ttft_s": 1.5,
"slo_tpot_s": 0.1}, ...}}``. What an entry leaves out, and a tenant that has none, gets the router's
options and the weight 1.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lorry.router.rates import Rates
from lorry.router.slo import NO_SLO, Slo
from lorry.rpc.errors import InvalidRequest
from lorry.rpc.names import check_id

LIMITS = ("max_queued_requests", "max_queued_tokens")
RATES = ("requests_per_s", "tokens_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    weight: float = 1.0  # its share of service, beside other tenants that wait
    max_queued_requests: int
    max_queued_tokens: int  # of prompts
    requests_per_s: float | None = None
    tokens_per_s: float | None = None  # of prompts and outputs
    slo: Slo = NO_SLO


@dataclass(frozen=True, slots=True)
class Tenants:
    others: Tenant  # every tenant that is not named
    named: Mapping[str, Tenant] = field(default_factory=dict)

    def __getitem__(self, tenant: str) -> Tenant:
        return self.named.get(tenant, self.others)

    def weight(self, tenant: str) -> float:
        return self[tenant].weight

    def rates(self, tenant: str) -> Rates:
        granted = self[tenant]
        return Rates(granted.requests_per_s, granted.tokens_per_s)


def read_tenants(path: Path | None, others: Tenant) -> Tenants:
    """Raises ValueError naming the entry and the value that is malformed."""
    if path is None:
        return Tenants(others)
    try:
        entries = json.loads(path.read_text())["tenants"]
        named = {
            check_id(name, field="tenants"): _tenant(name, entry, others)
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        raise ValueError(f"tenants file {path}: {error!r}") from error
    return Tenants(others, named)


def _tenant(tenant: str, entry: Mapping[str, Any], others: Tenant) -> Tenant:
    numbers = {name: _number(tenant, name, value) for name, value in entry.items()}
    slo = Slo(**{f.name: numbers.pop(f"slo_{f.name}", None) for f in fields(Slo)})
    defaults = {name: getattr(others, name) for name in ("weight", *LIMITS, *RATES)}
    for name, number in numbers.items():
        if name not in defaults:
            raise ValueError(f"{tenant}: there is no {name}")
        if name in LIMITS and not isinstance(number, int):
            raise ValueError(f"{tenant}: {name} must be whole, got {number}")
    return Tenant(**(defaults | numbers), slo=slo.over(others.slo))


def _number(tenant: str, name: str, value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{tenant}: {name} must be a positive number, got {value!r}")
    return value
