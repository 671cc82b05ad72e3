"""How fast each tenant may send requests and use tokens: token buckets.

A bucket fills at its rate up to what a burst may take. Tokens are counted as they are used, prompts
when they are queued and output as it is drawn, so a bucket may owe: then the tenant's next request
is refused until the debt is paid, while what runs goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lorry.rpc.errors import TenantLimit

ROUNDING = 1e-6  # of a request or token, by which a level may be wrong


class Rates(NamedTuple):
    """Of one tenant; None: any."""

    requests_per_s: float | None = None
    tokens_per_s: float | None = None


@dataclass(slots=True)
class Bucket:
    per_s: float
    burst: float  # that it holds when it is full
    level: float
    filled_s: float

    def fill(self, now_s: float) -> None:
        self.level = min(self.burst, self.level + (now_s - self.filled_s) * self.per_s)
        self.filled_s = now_s

    @property
    def wait_s(self) -> float:
        """Until there is one to take; 0 if there is."""
        lacking = 1.0 - self.level
        return lacking / self.per_s if lacking > ROUNDING else 0.0


class RateLimits:
    """`rates` are those of a tenant. A tenant that comes for the first time finds full buckets."""

    def __init__(self, rates: Callable[[str], Rates], *, burst_s: float) -> None:
        """`burst_s` seconds' worth of its rates a tenant may use at once."""
        self._rates = rates
        self._burst_s = burst_s
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    def check(self, tenant: str, now_s: float) -> None:
        """Raises TenantLimit, with a hint when to try again, if the tenant must wait."""
        rates = self._rates(tenant)
        for unit, per_s, buckets in (
            ("requests", rates.requests_per_s, self._requests),
            ("tokens", rates.tokens_per_s, self._tokens),
        ):
            if per_s is None:
                continue
            bucket = buckets.get(tenant)
            if bucket is None:
                burst = max(1.0, per_s * self._burst_s)
                bucket = buckets[tenant] = Bucket(per_s, burst, burst, now_s)
            bucket.fill(now_s)
            if bucket.wait_s:
                raise TenantLimit(
                    f"tenant {tenant} may use {per_s:g} {unit} a second",
                    retry_after_s=bucket.wait_s,
                    tenant=tenant,
                    limit=f"{per_s:g} {unit}/s",
                )

    def count_request(self, tenant: str) -> None:
        """Take one request, which `check` has let pass."""
        if bucket := self._requests.get(tenant):
            bucket.level -= 1.0

    def count_tokens(self, tenant: str, num_tokens: int) -> None:
        """Take tokens that are used in any case."""
        if bucket := self._tokens.get(tenant):
            bucket.level -= num_tokens


def unlimited() -> RateLimits:
    return RateLimits(lambda tenant: Rates(), burst_s=0.0)
