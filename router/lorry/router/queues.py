"""Requests that wait: one queue for each tenant's adapter version, within limits."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lorry.router.request import WAITING, Request, RequestState
from lorry.rpc.errors import QueueFull, TenantLimit

RETRY_AFTER_S = 1.0


class QueueKey(NamedTuple):
    tenant: str
    version: bytes  # empty: the base model


Queue = Mapping[int, Request]  # by arrival number, ascending


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


class RequestQueues:
    """A request takes its place on arrival and keeps it until `remove`.

    The limits hold for arrivals only: a request that comes back from a lost worker is not refused.
    """

    def __init__(self, *, limit: Amount, tenant_limit: Amount) -> None:
        self._tenant_limit = tenant_limit
        self._all = Waiting(limit)
        self._tenants: dict[str, Waiting] = {}
        self._arrivals: dict[int, Request] = {}
        self._queues: dict[QueueKey, dict[int, Request]] = {}
        self._next_number = 1

    def __len__(self) -> int:
        """Places taken."""
        return len(self._all.tokens)

    @property
    def queues(self) -> Mapping[QueueKey, Queue]:
        """The queues that are not empty."""
        return self._queues

    @property
    def arrivals(self) -> Queue:
        """All queued requests in one."""
        return self._arrivals

    def take_place(self, request: Request) -> None:
        """Raises QueueFull or TenantLimit, with a hint when to try again."""
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

    def add(self, request: Request) -> None:
        """Queue a request by its arrival, also one that comes back."""
        self._let_go(request)
        self._hold(request)  # by its tokens, which are known now
        key = QueueKey(request.tenant, request.version)
        self._queues[key] = _inserted(self._queues.get(key, {}), request)
        self._arrivals = _inserted(self._arrivals, request)

    def remove(self, request: Request) -> None:
        """Free the request's place. Does nothing if it has none."""
        self._let_go(request)
        if self._arrivals.pop(request.number, None) is not None:
            key = QueueKey(request.tenant, request.version)
            queue = self._queues[key]
            del queue[request.number]
            if not queue:
                del self._queues[key]

    def check_integrity(self) -> None:
        """Every place belongs to one waiting request, counted once."""
        queued = [request for queue in self._queues.values() for request in queue.values()]
        assert all(self._queues.values()), "an empty queue was kept"
        assert all(list(queue) == sorted(queue) for queue in self._queues.values())
        assert list(self._arrivals.items()) == sorted((r.number, r) for r in queued)
        held = self._all.tokens
        assert set(queued) == {r for r in held if r.state is RequestState.QUEUED}
        assert all(request.state in WAITING for request in held)
        per_tenant = {name: len(waiting.tokens) for name, waiting in self._tenants.items()}
        assert per_tenant == Counter(request.tenant for request in held)
        for waiting in (self._all, *self._tenants.values()):
            assert waiting.num_tokens == sum(held[request] for request in waiting.tokens)

    def _hold(self, request: Request) -> None:
        tenant = self._tenants.setdefault(request.tenant, Waiting(self._tenant_limit))
        for waiting in (self._all, tenant):
            waiting.hold(request, request.num_prompt_tokens)

    def _let_go(self, request: Request) -> None:
        if request not in self._all.tokens:
            return
        tenant = self._tenants[request.tenant]
        for waiting in (self._all, tenant):
            waiting.let_go(request)
        if not tenant.tokens:
            del self._tenants[request.tenant]


def _inserted(queue: dict[int, Request], request: Request) -> dict[int, Request]:
    """`queue` with the request at its place; almost always that is the end."""
    comes_back = bool(queue) and next(reversed(queue)) > request.number
    queue[request.number] = request
    return dict(sorted(queue.items())) if comes_back else queue
