"""Which workers can take a request so that tokens come in time: its own, and those of others."""

import math
from collections.abc import Sequence

from lorry.router.predictor import Predictor, lone_step_s
from lorry.router.request import Request
from lorry.router.worker import Worker

ALIKE = 1.5  # times per output token that differ by less may share a worker at little cost


class TpotPolicy:
    """A worker is filled up to `share` of the least time per output token that is asked for there.

    Each request more makes the steps of all that run longer, so one that asks for quick tokens
    keeps a worker from being filled: those that ask for about the same had better share one.
    0: such objectives are counted, but decide nothing.
    """

    def __init__(self, predictor: Predictor, *, share: float) -> None:
        self._predictor = predictor
        self._share = share

    def fitting(self, request: Request, workers: list[Worker]) -> list[Worker]:
        """Of `workers` those that keep all objectives, and the best of them for others' sake."""
        asked_s = _asked_s(request)
        if not self._share or (
            asked_s == math.inf and all([w.tightest_tpot_s == math.inf for w in workers])
        ):
            return workers
        keeping = [worker for worker in workers if self.keeps(request, worker)]
        return [worker for worker in keeping if _suits(asked_s, worker)] or keeping

    def has_room(self, worker: Worker) -> bool:
        """Whether with one more request those that run there would keep theirs."""
        return self._keeps(worker.tightest_tpot_s, worker)

    def keeps(self, request: Request, worker: Worker) -> bool:
        """Whether with the request there it would keep its own, too; an idle worker's would."""
        return self._keeps(min(_asked_s(request), worker.tightest_tpot_s), worker)

    def missed_s(self, request: Request, workers: Sequence[Worker]) -> float | None:
        """What the request's tokens would take at the best of `workers`; None: they would be in
        time."""
        asked_s = _asked_s(request)
        if not self._share or asked_s == math.inf:
            return None
        best_s = min([self._promise_s(w) if w.active else 0.0 for w in workers], default=0.0)
        return best_s if best_s > asked_s else None

    def out_of_reach_s(self, request: Request, workers: Sequence[Worker]) -> float | None:
        """What they would take at the best of them if it did nothing else; None: they would be in
        time, or nobody knows."""
        asked_s = _asked_s(request)
        if not self._share or asked_s == math.inf:
            return None
        least_s = min(map(lone_step_s, workers), default=0.0)
        return least_s if least_s > asked_s else None

    def _keeps(self, asked_s: float, worker: Worker) -> bool:
        if not self._share or asked_s == math.inf or not worker.active:
            return True
        return self._promise_s(worker) <= asked_s

    def _promise_s(self, worker: Worker) -> float:
        return self._predictor.tpot_s(worker) / self._share


def _asked_s(request: Request) -> float:
    tpot_s = request.slo.tpot_s
    return math.inf if tpot_s is None else tpot_s


def _suits(asked_s: float, worker: Worker) -> bool:
    tightest_s = worker.tightest_tpot_s
    if asked_s == tightest_s or not worker.active:
        return True
    return tightest_s / ALIKE <= asked_s <= tightest_s * ALIKE < math.inf
