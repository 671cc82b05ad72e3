"""The places of requests that wait, within limits."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
    num_requests: int = 0
    num_tokens: int = 0

    def hold(self, num_tokens: int) -> None:
        self.num_requests += 1
        self.num_tokens += num_tokens

    def let_go(self, num_tokens: int) -> None:
        self.num_requests -= 1
        self.num_tokens -= num_tokens

    def excess(self, request: Request) -> str | None:
        """What the request would be too many of; alone it is welcome whatever its size."""
        if self.num_requests >= self.limit.requests:
            return f"{self.limit.requests} requests"
        if self.num_requests and self.num_tokens + request.num_prompt_tokens > self.limit.tokens:
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
        self._tokens: dict[Request, int] = {}  # of each that has a place, as counted
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._tokens)

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
        num_tokens = self._tokens.pop(request, None)
        if num_tokens is None:
            return
        tenant = self._tenants[request.tenant]
        self._all.let_go(num_tokens)
        tenant.let_go(num_tokens)
        if not tenant.num_requests:
            del self._tenants[request.tenant]

    def check_integrity(self) -> None:
        """Every place belongs to one waiting request, counted once."""
        assert all(request.state in WAITING for request in self._tokens)
        requests, tokens = Counter[str](), Counter[str]()
        for request, num_tokens in self._tokens.items():
            requests[request.tenant] += 1
            tokens[request.tenant] += num_tokens
        assert requests == {name: each.num_requests for name, each in self._tenants.items()}
        assert tokens == {name: each.num_tokens for name, each in self._tenants.items()}
        assert self._all.num_requests == requests.total()
        assert self._all.num_tokens == tokens.total()

    def _hold(self, request: Request) -> None:
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = Waiting(self._tenant_limit(request.tenant))
        num_tokens = self._tokens[request] = request.num_prompt_tokens
        self._all.hold(num_tokens)
        tenant.hold(num_tokens)
