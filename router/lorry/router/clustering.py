"""Which adapters share a batch: few at a time, while many wait."""

from typing import Protocol

from lorry.router.backlog import Backlog
from lorry.router.request import Request
from lorry.router.worker import Worker


class Clustering(Protocol):
    max_wait_s: float  # that a request is passed over at most

    def instead_of(self, request: Request, worker: Worker, backlog: Backlog) -> Request | None:
        """Who goes to the worker before `request`, whose turn it is; None: nobody."""
        ...


class NoClustering:
    max_wait_s = 0.0

    def instead_of(self, request: Request, worker: Worker, backlog: Backlog) -> Request | None:
        return None


class AdapterClustering:
    """Once a worker runs `max_adapters`, requests of these go before one of another adapter.

    If none of theirs waits, the other one joins: no room stays empty. As S-LoRA's (arXiv
    2311.03285, section 4.2), with a bound on the wait that it causes. The base model counts as no
    adapter.
    """

    def __init__(self, *, max_adapters: int, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._max_adapters = max_adapters

    def instead_of(self, request: Request, worker: Worker, backlog: Backlog) -> Request | None:
        running = worker.num_requests
        if not request.version or request.version in running:
            return None
        if len(running) - (b"" in running) < self._max_adapters:
            return None
        other = backlog.first_with(running)
        return other if other is not None and worker.can_serve(other) else None
