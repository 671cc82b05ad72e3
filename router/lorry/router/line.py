"""The queued requests in the sequence of one order and one fairness."""

import heapq
import math
from collections.abc import Iterable

from lorry.router.fairness import Fairness
from lorry.router.keyed_heap import KeyedHeap
from lorry.router.order import Order
from lorry.router.queue import Queue, Turn
from lorry.router.request import Request

SPARE_TURNS = 16  # that a heap may hold beside twice as many as its queue has requests
# What heaps compare: the rank by fairness, then the first turn. Flat, since following one more
# reference takes long where there are too many for the CPU's caches, and without the request, which
# would be kept as long as a key that is out of date.
QueueKey = tuple[float, float, int, int, Queue]
TenantKey = tuple[float, float, int, int, Queue, str]


class Line:
    """Fairness chooses the tenant and its queue, order the request; no step depends on how many
    there are but by a logarithm.

    A request leaves by its `turn` alone, and its turn here is dropped when it comes to the front.
    `index` is that of the line's heap in each queue.
    """

    def __init__(self, order: Order, fairness: Fairness, index: int) -> None:
        self.order = order
        self._fairness = fairness
        self._index = index
        self._tenants: dict[str, KeyedHeap[Queue, QueueKey]] = {}
        self._first = KeyedHeap[str, TenantKey](self._tenant_key)
        self._held: set[str] = set()

    def add(self, request: Request) -> None:
        self.put_back((self.order.key(request), request.number, request.turn, request))

    def put_back(self, turn: Turn) -> None:
        """Let a request have its turn that was taken."""
        queue = turn[3].queue
        heap = queue.heaps[self._index]
        heapq.heappush(heap, turn)
        if len(heap) > 2 * len(queue.requests) + SPARE_TURNS:
            heap[:] = filter(is_waiting, heap)
            heapq.heapify(heap)
        self.touch(queue)

    def take(self, queue: Queue) -> Turn:
        """The turn of the queue's first request, which is in line no more."""
        turn = self._first_of(queue)
        assert turn is not None, "nobody is in line"
        return heapq.heappop(queue.heaps[self._index])

    def hold(self, tenant: str) -> None:
        """Have the tenant's requests skipped until `release`."""
        self._held.add(tenant)

    def release(self) -> None:
        """Undo all `hold`."""
        held, self._held = self._held, set()
        for tenant in held & self._tenants.keys():
            self._first.touch(tenant)

    def first(self) -> Request | None:
        least = self._first.least()
        if least is None:
            return None
        turn = least[4].heaps[self._index][0]  # who has left was dropped for the key just now
        return turn[3]

    def first_among(self, queues: Iterable[Queue]) -> Request | None:
        """Who is next of these queues' requests."""
        fairness, best, best_rank = self._fairness, None, math.inf
        tenant_rank = fairness.tenant_rank
        for queue in queues:
            rank = tenant_rank(queue.tenant)
            if rank <= best_rank and (turn := self._first_of(queue)) is not None:
                key = (rank, fairness.queue_rank(queue), turn)
                if best is None or key < best:
                    best, best_rank = key, rank
        return None if best is None else best[2][3]

    def touch(self, queue: Queue) -> None:
        """Its rank may have become less."""
        heap = self._tenants.get(queue.tenant)
        if heap is None:
            heap = self._tenants[queue.tenant] = KeyedHeap[Queue, QueueKey](self._queue_key)
        heap.touch(queue)
        self._first.touch(queue.tenant)

    def waiting(self, queue: Queue) -> list[Request]:
        """Those of the queue that are in line, in any order."""
        return [turn[3] for turn in filter(is_waiting, queue.heaps[self._index])]

    def _first_of(self, queue: Queue) -> Turn | None:
        heap = queue.heaps[self._index]
        while heap:
            turn = heap[0]
            if turn[3].turn == turn[2]:
                return turn
            heapq.heappop(heap)
        return None

    def _queue_key(self, queue: Queue) -> QueueKey | None:
        turn = self._first_of(queue)
        if turn is None:
            return None
        key, number, joined, _ = turn
        return (self._fairness.queue_rank(queue), key, number, joined, queue)

    def _tenant_key(self, tenant: str) -> TenantKey | None:
        least = None if tenant in self._held else self._tenants[tenant].least()
        if least is None:
            return None
        _, key, number, joined, queue = least
        return (self._fairness.tenant_rank(tenant), key, number, joined, queue, tenant)


def is_waiting(turn: Turn) -> bool:
    """Whether its request has not left the line."""
    return turn[3].turn == turn[2]
