"""Requests that wait: one queue for each tenant's adapter version, within limits of places."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from lorry.router.request import WAITING, Request, RequestState
from lorry.rpc.errors import QueueFull, TenantLimit

RETRY_AFTER_S = 1.0


class QueueKey(NamedTuple):
    tenant: str
    version: bytes  # empty: the base model


Queue = Mapping[int, Request]  # by arrival number, ascending


class RequestQueues:
    """A request takes its place on arrival and keeps it until `remove`.

    The limits hold for arrivals only: a request that comes back from a lost worker is not refused.
    """

    def __init__(self, *, max_requests: int, max_requests_per_tenant: int) -> None:
        self._max_requests = max_requests
        self._max_requests_per_tenant = max_requests_per_tenant
        self._holders: set[Request] = set()
        self._per_tenant: Counter[str] = Counter()
        self._arrivals: dict[int, Request] = {}
        self._queues: dict[QueueKey, dict[int, Request]] = {}
        self._next_number = 1

    def __len__(self) -> int:
        """Places taken."""
        return len(self._holders)

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
        if len(self._holders) >= self._max_requests:
            raise QueueFull(
                f"the queue holds {self._max_requests} requests, its limit",
                retry_after_s=RETRY_AFTER_S,
                maxQueuedRequests=self._max_requests,
            )
        if self._per_tenant[request.tenant] >= self._max_requests_per_tenant:
            raise TenantLimit(
                f"tenant {request.tenant} has {self._max_requests_per_tenant} waiting requests, "
                "its limit",
                retry_after_s=RETRY_AFTER_S,
                tenant=request.tenant,
                maxQueuedRequests=self._max_requests_per_tenant,
            )
        request.number, self._next_number = self._next_number, self._next_number + 1
        self._hold(request)

    def add(self, request: Request) -> None:
        """Queue a request by its arrival, also one that comes back."""
        if request not in self._holders:
            self._hold(request)
        key = QueueKey(request.tenant, request.version)
        self._queues[key] = _inserted(self._queues.get(key, {}), request)
        self._arrivals = _inserted(self._arrivals, request)

    def remove(self, request: Request) -> None:
        """Free the request's place. Does nothing if it has none."""
        if request not in self._holders:
            return
        self._holders.remove(request)
        self._per_tenant[request.tenant] -= 1
        if not self._per_tenant[request.tenant]:
            del self._per_tenant[request.tenant]
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
        assert set(queued) == {r for r in self._holders if r.state is RequestState.QUEUED}
        assert all(request.state in WAITING for request in self._holders)
        assert self._per_tenant == Counter(request.tenant for request in self._holders)

    def _hold(self, request: Request) -> None:
        self._holders.add(request)
        self._per_tenant[request.tenant] += 1


def _inserted(queue: dict[int, Request], request: Request) -> dict[int, Request]:
    """`queue` with the request at its place; almost always that is the end."""
    comes_back = bool(queue) and next(reversed(queue)) > request.number
    queue[request.number] = request
    return dict(sorted(queue.items())) if comes_back else queue
