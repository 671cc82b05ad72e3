"""The places of requests that wait, within limits."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lorry.router.request import WAITING, Request
from lorry.rpc.errors import QueueFull, TenantLimit

RETRY_AFTER_S = 1.0


class Amount(NamedTuple):
    """Of waiting requests and of the tokens of their prompts."""

    requests: int
    tokens: int


@dataclass(slots=True)
class Waiting:
    """What waits within one limit."""

    limit: Amount
    tokens: dict[Request, int] = field(default_factory=dict)
    num_tokens: int = 0

    def hold(self, request: Request, num_tokens: int) -> None:
        self.tokens[request] = num_tokens
        self.num_tokens += num_tokens

    def let_go(self, request: Request) -> None:
        self.num_tokens -= self.tokens.pop(request)

    def excess(self, request: Request) -> str | None:
        """What the request would be too many of; alone it is welcome whatever its size."""
        if len(self.tokens) >= self.limit.requests:
            return f"{self.limit.requests} requests"
        if self.tokens and self.num_tokens + request.num_prompt_tokens > self.limit.tokens:
            return f"{self.limit.tokens} prompt tokens"
        return None


class Places:
    """A request takes its place on arrival and keeps it until `free`.

    The limits hold for arrivals only: a request that comes back from a lost worker is not refused.
    """

    def __init__(self, *, limit: Amount, tenant_limit: Callable[[str], Amount]) -> None:
        self._tenant_limit = tenant_limit
        self._all = Waiting(limit)
        self._tenants: dict[str, Waiting] = {}
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._all.tokens)

    def take(self, request: Request) -> None:
        """Number an arrival; raises QueueFull or TenantLimit, with a hint when to try again."""
        if excess := self._all.excess(request):
            raise QueueFull(
                f"no more than {excess} may wait",
                retry_after_s=RETRY_AFTER_S,
                maxQueuedRequests=self._all.limit.requests,
                maxQueuedTokens=self._all.limit.tokens,
            )
        tenant = self._tenants.get(request.tenant)
        if tenant is not None and (excess := tenant.excess(request)):
            raise TenantLimit(
                f"no more than {excess} of tenant {request.tenant} may wait",
                retry_after_s=RETRY_AFTER_S,
                tenant=request.tenant,
                maxQueuedRequests=tenant.limit.requests,
                maxQueuedTokens=tenant.limit.tokens,
            )
        request.number, self._next_number = self._next_number, self._next_number + 1
        self._hold(request)

    def keep(self, request: Request) -> None:
        """Count a request by its tokens, which are known now; also one that comes back."""
        self.free(request)
        self._hold(request)

    def free(self, request: Request) -> None:
        """Does nothing if it has no place."""
        if request not in self._all.tokens:
            return
        tenant = self._tenants[request.tenant]
        for waiting in (self._all, tenant):
            waiting.let_go(request)
        if not tenant.tokens:
            del self._tenants[request.tenant]

    def check_integrity(self) -> None:
        """Every place belongs to one waiting request, counted once."""
        held = self._all.tokens
        assert all(request.state in WAITING for request in held)
        per_tenant = {name: len(waiting.tokens) for name, waiting in self._tenants.items()}
        assert per_tenant == Counter(request.tenant for request in held)
        for waiting in (self._all, *self._tenants.values()):
            assert waiting.num_tokens == sum(held[request] for request in waiting.tokens)

    def _hold(self, request: Request) -> None:
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = Waiting(self._tenant_limit(request.tenant))
        for waiting in (self._all, tenant):
            waiting.hold(request, request.num_prompt_tokens)
