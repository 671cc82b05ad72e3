"""Which worker a request goes to."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from lorry.router.request import Request
from lorry.router.worker import Worker

IMBALANCE_SHARE = 0.25  # of the idlest worker's load that never counts as an imbalance


class Placement(Protocol):
    def place(self, request: Request, workers: Sequence[Worker]) -> Worker | None:
        """Which of `workers`, all able to serve it, gets the request; None: none for now."""
        ...


class ResidencyPlacement:
    """A worker that holds the adapter, unless it is much busier than the idlest one.

    On the GPU, or on its way there, is better than in host memory, and that better than absent. So
    an adapter has one worker until its requests overload it, and then as many as they need. Among
    equals the idlest gets the request, and among idle ones adapters are spread by a hash.
    """

    def __init__(self, *, imbalance: int) -> None:
        self._imbalance = imbalance  # requests

    def place(self, request: Request, workers: Sequence[Worker]) -> Worker | None:
        if not workers:
            return None
        least = min(worker.load for worker in workers)
        most = least + max(self._imbalance, least * IMBALANCE_SHARE)
        near = [worker for worker in workers if worker.load <= most]
        return min(near, key=lambda worker: _rank(request, worker))


def _rank(request: Request, worker: Worker) -> tuple[int, int, bytes]:
    """The lowest is preferred."""
    by_hash = hashlib.blake2b(request.version + worker.name.encode(), digest_size=8).digest()
    return _distance(request, worker), worker.load, by_hash


def _distance(request: Request, worker: Worker) -> int:
    if not request.version or worker.will_hold(request.version):
        return 0
    return 1 if request.version in worker.host else 2
