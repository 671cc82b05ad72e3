"""The queued requests in the sequence of one order and one fairness."""

import heapq
from collections.abc import Iterable

from lorry.router.fairness import Fairness, QueueKey
from lorry.router.keyed_heap import KeyedHeap
from lorry.router.order import Order
from lorry.router.request import Request

Turn = tuple[float, int, Request]  # a request's key in its order, its number, and itself
SPARE_ENTRIES = 16


class Line:
    """Fairness chooses the tenant and its queue, order the request; no step depends on how many
    there are but by a logarithm."""

    def __init__(self, order: Order, fairness: Fairness) -> None:
        self.order = order
        self._fairness = fairness
        self._turns: dict[Request, Turn] = {}
        self._queues: dict[QueueKey, list[Turn]] = {}  # heaps
        self._num_requests: dict[QueueKey, int] = {}
        self._tenants: dict[str, KeyedHeap[QueueKey]] = {}
        self._first = KeyedHeap[str](self._tenant_key)
        self._held: set[str] = set()

    def __contains__(self, request: Request) -> bool:
        return request in self._turns

    def add(self, request: Request) -> None:
        self.put_back((self.order.key(request), request.number, request))

    def put_back(self, turn: Turn) -> None:
        """Let a request have its turn that was discarded."""
        key, number, request = turn
        queue = request.queue
        # A new one: the old one may still be in the heap, where it counts as having left.
        turn = self._turns[request] = (key, number, request)
        heapq.heappush(self._queues.setdefault(queue, []), turn)
        self._num_requests[queue] = self._num_requests.get(queue, 0) + 1
        self.touch(queue)

    def discard(self, request: Request) -> Turn | None:
        """Its turn; None if it is not in line."""
        turn = self._turns.pop(request, None)
        if turn is None:
            return None
        queue = request.queue
        left = self._num_requests[queue] = self._num_requests[queue] - 1
        if not left:
            del self._num_requests[queue], self._queues[queue]
        elif len(self._queues[queue]) > 2 * left + SPARE_ENTRIES:
            turns = self._turns
            self._queues[queue] = [t for t in self._queues[queue] if turns.get(t[2]) is t]
            heapq.heapify(self._queues[queue])
        return turn

    def hold(self, tenant: str) -> None:
        """Have the tenant's requests skipped until `release`."""
        self._held.add(tenant)

    def release(self) -> None:
        """Undo all `hold`."""
        held, self._held = self._held, set()
        for tenant in held & self._tenants.keys():
            self._first.touch(tenant)

    def first(self) -> Request | None:
        tenant = self._first.first()
        queue = None if tenant is None else self._tenants[tenant].first()
        return None if queue is None else self.first_of(queue)

    def first_of(self, queue: QueueKey) -> Request | None:
        first = self._first_of(queue)
        return None if first is None else first[2]

    def first_among(self, queues: Iterable[QueueKey]) -> Request | None:
        """Who is next of these queues' requests."""
        fairness = self._fairness
        by_rank: dict[float, list[QueueKey]] = {}
        for queue in queues:
            by_rank.setdefault(fairness.tenant_rank(queue.tenant), []).append(queue)
        for rank in sorted(by_rank):
            turns = [
                (fairness.queue_rank(queue), first)
                for queue in by_rank[rank]
                if (first := self._first_of(queue)) is not None
            ]
            if turns:
                return min(turns)[1][2]
        return None

    def touch(self, queue: QueueKey) -> None:
        """Its rank may have become less."""
        heap = self._tenants.get(queue.tenant)
        if heap is None:
            heap = self._tenants[queue.tenant] = KeyedHeap[QueueKey](self._queue_key)
        heap.touch(queue)
        self._first.touch(queue.tenant)

    def _first_of(self, queue: QueueKey) -> Turn | None:
        """The turn of the queue's first request, without those that have left before it."""
        queued = self._queues.get(queue)
        if queued is None:
            return None
        turns = self._turns
        while turns.get(queued[0][2]) is not queued[0]:
            heapq.heappop(queued)
        return queued[0]

    def _queue_key(self, queue: QueueKey) -> tuple[int, float, int] | None:
        first = self._first_of(queue)
        return None if first is None else (self._fairness.queue_rank(queue), *first[:2])

    def _tenant_key(self, tenant: str) -> tuple[float, float, int] | None:
        queue = None if tenant in self._held else self._tenants[tenant].first()
        first = None if queue is None else self._first_of(queue)
        return None if first is None else (self._fairness.tenant_rank(tenant), *first[:2])
