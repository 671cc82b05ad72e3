"""Which worker a request goes to, and which take any."""

import math
from collections.abc import Sequence
from typing import Protocol
from zlib import crc32

from lorry.router.predictor import Predictor
from lorry.router.request import Request
from lorry.router.worker import Worker

IMBALANCE_SHARE = 0.25  # of the idlest worker's load that never counts as an imbalance
MIN_UNSTARTED = 2  # requests that a worker always has room for, so that it is never idle


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
        if len(workers) < 2:
            return workers[0] if workers else None
        least = min([len(worker.active) for worker in workers])
        most = least + max(self._imbalance, least * IMBALANCE_SHARE)
        nearest = _nearest(request.version, [w for w in workers if len(w.active) <= most])
        if len(nearest) > 1:
            least = min([len(worker.active) for worker in nearest])
            nearest = [worker for worker in nearest if len(worker.active) == least]
        if len(nearest) == 1:
            return nearest[0]
        return min(nearest, key=lambda worker: _spread(request.version, worker))


class Pacing:
    """Which workers have room for one more request.

    Requests are held back here rather than queue at a worker, since what is sent has lost its turn
    to the policies: a worker gets no more than it begins within `backlog_s`, at its present pace.
    0: as much as it takes.
    """

    def __init__(self, predictor: Predictor, *, backlog_s: float) -> None:
        self._predictor = predictor
        self._backlog_s = backlog_s

    def has_room(self, worker: Worker) -> bool:
        return worker.has_room and self.has_room_in(worker, self.room_tokens(worker))

    def has_room_in(self, worker: Worker, room_tokens: float) -> bool:
        """Whether a worker that takes requests would have if so many tokens of prompts might wait
        there."""
        return len(worker.unstarted) < MIN_UNSTARTED or worker.unstarted_tokens < room_tokens

    def room_tokens(self, worker: Worker) -> float:
        """Of prompts, that may wait at the worker."""
        return self._predictor.pace(worker) * self._backlog_s if self._backlog_s else math.inf


def _nearest(version: bytes, workers: list[Worker]) -> list[Worker]:
    """Those of the least distance; looks at all of them at once, as each pick does so twice."""
    if not version:
        return workers
    holders = [w for w in workers if version in w.num_requests or version in w.gpu]
    return holders or [w for w in workers if version in w.host] or workers


def distance(version: bytes, worker: Worker) -> int:
    """Of a version from the worker's GPU: 0 there or on its way, 1 in host memory, 2 absent."""
    if not version or worker.will_hold(version):
        return 0
    return 1 if version in worker.host else 2


def _spread(version: bytes, worker: Worker) -> int:
    """Rendezvous hashing."""
    return crc32(worker.name.encode(), crc32(version))
