"""The workers that take requests during one plan."""

import math
from collections.abc import Iterable

from lorry.router.placement import Pacing
from lorry.router.request import Request
from lorry.router.reserve import Reserve
from lorry.router.tpot import TpotPolicy
from lorry.router.worker import Worker, able


class OpenWorkers:
    """Those with room for one more, be it only for tenants that have less than their share."""

    def __init__(
        self, workers: Iterable[Worker], pacing: Pacing, reserve: Reserve, tpot: TpotPolicy
    ) -> None:
        self._pacing = pacing
        self._tpot = tpot
        self._reserve = reserve
        self._open: list[Worker] = []
        self._tight: set[Worker] = set()
        for worker in [w for w in workers if w.num_submitted < w.submit_limit]:  # most are full
            self._note(worker)

    def __bool__(self) -> bool:
        return bool(self._open)

    def able(self, request: Request) -> list[Worker]:
        """That can serve the request, have room for its tenant and keep tokens coming in time."""
        workers = able(self._open, request)
        if self._tight:
            workers = [worker for worker in workers if not self._is_kept(worker, request.tenant)]
        return self._tpot.fitting(request, workers)

    def are_kept_from(self, tenant: str) -> bool:
        """Whether no request of the tenant can go anywhere."""
        return len(self._tight) == len(self._open) and all(
            self._reserve.is_over(tenant, worker) for worker in self._open
        )

    def note_sent(self, worker: Worker) -> None:
        """The worker has got a request."""
        self._open.remove(worker)
        self._tight.discard(worker)
        self._note(worker)

    def _note(self, worker: Worker) -> None:
        """Where prompts of tenants with more than their share keep its room, the others have as
        much again."""
        if not worker.has_room or not self._tpot.has_room(worker):
            return
        room_tokens = self._pacing.room_tokens(worker) if worker.unstarted else math.inf
        is_tight = self._reserve.is_tight(worker, room_tokens)
        if self._pacing.has_room_in(worker, (1 + is_tight) * room_tokens):
            self._open.append(worker)
            if is_tight:
                self._tight.add(worker)

    def _is_kept(self, worker: Worker, tenant: str) -> bool:
        return worker in self._tight and self._reserve.is_over(tenant, worker)
