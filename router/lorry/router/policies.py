"""What to send next, and where: one small class for each policy, without I/O and clock.

They compose: the dispatcher asks `order` for the sequence of waiting requests and `placement` for
the worker of each.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from lorry.router.queues import RequestQueues
from lorry.router.request import Request
from lorry.router.worker import Worker


class Order(Protocol):
    def order(self, queues: RequestQueues) -> Iterable[Request]:
        """The queued requests, the next first. `queues` do not change meanwhile."""
        ...


class Placement(Protocol):
    def place(self, request: Request, workers: Sequence[Worker]) -> Worker | None:
        """Which of `workers`, all able to serve it, gets the request; None: none for now."""
        ...


class ArrivalOrder:
    """First come, first served, across all adapters."""

    def order(self, queues: RequestQueues) -> Iterable[Request]:
        return queues.arrivals.values()


class ResidencyPlacement:
    """A worker that holds the adapter, unless it is much busier than the idlest one.

    On the GPU is better than in host memory, and that better than absent.
    """

    def __init__(self, *, imbalance: int) -> None:
        self._imbalance = imbalance  # requests

    def place(self, request: Request, workers: Sequence[Worker]) -> Worker | None:
        if not workers:
            return None
        most = min(worker.load for worker in workers) + self._imbalance
        near = [worker for worker in workers if worker.load <= most]
        return min(near, key=lambda worker: (_distance(request, worker), worker.load))


def _distance(request: Request, worker: Worker) -> int:
    if not request.version or request.version in worker.gpu:
        return 0
    return 1 if request.version in worker.host else 2
