"""The workers that take requests during one plan."""

from collections.abc import Iterable

from lorry.router.placement import Pacing
from lorry.router.request import Request
from lorry.router.reserve import Reserve
from lorry.router.worker import Worker, able


class OpenWorkers:
    """Those with room for one more, be it only for tenants that have less than their share."""

    def __init__(self, workers: Iterable[Worker], pacing: Pacing, reserve: Reserve) -> None:
        self._pacing = pacing
        self._reserve = reserve
        self._open = [worker for worker in workers if pacing.has_room(worker)]
        self._tight = {worker for worker in self._open if reserve.is_tight(worker)}

    def __bool__(self) -> bool:
        return bool(self._open)

    def able(self, request: Request) -> list[Worker]:
        """That can serve the request and have room for its tenant."""
        workers = able(self._open, request)
        if self._tight:
            return [worker for worker in workers if not self._is_kept(worker, request.tenant)]
        return workers

    def are_kept_from(self, tenant: str) -> bool:
        """Whether no request of the tenant can go anywhere."""
        return len(self._tight) == len(self._open) and all(
            self._reserve.is_over(tenant, worker) for worker in self._open
        )

    def note_sent(self, worker: Worker) -> None:
        """The worker has got a request."""
        if not self._pacing.has_room(worker):
            self._open.remove(worker)
            self._tight.discard(worker)
        elif self._reserve.is_tight(worker):
            self._tight.add(worker)

    def _is_kept(self, worker: Worker, tenant: str) -> bool:
        return worker in self._tight and self._reserve.is_over(tenant, worker)
