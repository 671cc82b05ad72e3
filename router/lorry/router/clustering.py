"""Which adapters share a batch: those that are there already, while many wait."""

from collections.abc import Callable
from typing import Protocol

from lorry.router.backlog import Backlog
from lorry.router.placement import distance
from lorry.router.request import Request
from lorry.router.worker import Worker


class Clustering(Protocol):
    max_wait_s: float  # that a request is passed over at most

    def instead_of(
        self, request: Request, worker: Worker, preferred: Callable[[], Worker], backlog: Backlog
    ) -> Request | None:
        """Who goes to the worker before `request`, whose turn it is; None: nobody.

        The worker runs no request of its adapter. `preferred` tells where it would go if all
        workers had room.
        """
        ...


class NoClustering:
    max_wait_s = 0.0

    def instead_of(
        self, request: Request, worker: Worker, preferred: Callable[[], Worker], backlog: Backlog
    ) -> Request | None:
        return None


class AdapterClustering:
    """Requests of adapters that a worker runs go before one that had better not join them.

    That is one whose adapter is nearer to another worker, which has no room just now, and once the
    worker runs `max_adapters`, any of another adapter that has no objective for its first token: if
    it has one, the wait costs more than a batch of fewer adapters gains. If none of theirs waits,
    the other one joins: no room stays empty. The limit is S-LoRA's (arXiv 2311.03285, section 4.2),
    with a bound on the wait that it causes. The base model counts as no adapter.
    """

    def __init__(self, *, max_adapters: int, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._max_adapters = max_adapters

    def instead_of(
        self, request: Request, worker: Worker, preferred: Callable[[], Worker], backlog: Backlog
    ) -> Request | None:
        version = request.version
        if not (self.is_limited(request) and self.is_full(worker)) and (
            distance(version, worker) <= distance(version, preferred())
        ):
            return None
        other = backlog.first_with(worker.queues.values())
        return other if other is not None and worker.can_serve(other) else None

    def is_limited(self, request: Request) -> bool:
        """Whether it must wait while a worker is full."""
        return request.slo.ttft_s is None

    def is_full(self, worker: Worker) -> bool:
        """Whether it runs as many adapters as it should."""
        running = worker.num_requests
        return len(running) - (b"" in running) >= self._max_adapters
