"""When a request gets its first token, and how fast the others follow.

What a worker measures of itself (the time of a step by rows, what a prompt token adds to it, the
rate of adapter loads) gives the time of a request alone. How fast those ahead of it go is learned:
see `lorry.router.pace`. Until something is measured, priors stand for it that promise too much
rather than too little, since what is promised too little is aborted.
"""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field

from lorry.router.pace import Pace
from lorry.router.request import Request
from lorry.router.worker import Worker
from lorry.rpc.histogram import Histogram

PRIOR_TOKENS_PER_S = 20_000.0
PRIOR_STEP_S = 0.01
PRIOR_LOAD_BYTES_PER_S = 10e9  # from host memory to the GPU
PRIOR_FETCH_BYTES_PER_S = 1e9  # from the adapter store to host memory
ERRORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)  # shares of the true time


@dataclass(slots=True)
class PredictionErrors:
    """|predicted - true| / true, of times to first token."""

    at_arrival: Histogram = field(default_factory=lambda: Histogram(ERRORS))
    at_submit: Histogram = field(default_factory=lambda: Histogram(ERRORS))


class Predictor:
    """Hears what happens at the workers; every method but `service_s` and those below changes
    only what it has learned."""

    def __init__(self) -> None:
        self.errors = PredictionErrors()
        self._paces: dict[Worker, Pace] = {}
        self._begun_s: dict[Worker, float] = {}  # when a request began there last

    def forget(self, worker: Worker) -> None:
        self._paces.pop(worker, None)
        self._begun_s.pop(worker, None)

    def advance(self, worker: Worker, now_s: float) -> None:
        """To be called before what the worker has to do changes."""
        pace = self._paces.get(worker)
        if pace is None:
            pace = self._paces[worker] = Pace(now_s)
        pace.advance(now_s, contended=_contended(worker), tokens_per_s=_tokens_per_s(worker))

    def begin(self, request: Request, worker: Worker, now_s: float) -> None:
        """The request's first token has come; `worker` still counts it among the unstarted."""
        self.advance(worker, now_s)
        self._begun_s[worker] = now_s
        if _contended(worker):
            self._paces[worker].begin(worker.unstarted.get(request, 0))
        _note(self.errors.at_arrival, request.predicted_ttft_s, now_s - request.arrival_s)
        _note(self.errors.at_submit, request.predicted_service_s, now_s - request.last_submit_s)

    def service_s(self, request: Request, worker: Worker, now_s: float) -> float:
        """From a submit now to the first token."""
        own_s = request.num_known_tokens / _tokens_per_s(worker)
        return (
            max(self._ahead_s(worker, now_s), load_s(request, worker)) + own_s + self.tpot_s(worker)
        )

    def pace(self, worker: Worker) -> float:
        """Prompt tokens per second of requests that it begins while others wait."""
        return _tokens_per_s(worker) * self._share(worker)

    def wait_s(self, num_tokens: float, workers: Collection[Worker]) -> float:
        """Until the workers have begun requests of so many prompt tokens."""
        rate = sum(map(self.pace, workers))
        return num_tokens / rate if rate else 0.0

    def tpot_s(self, worker: Worker) -> float:
        """Of one more request."""
        return step_s(worker, len(worker.active) + 1)

    def _ahead_s(self, worker: Worker, now_s: float) -> float:
        """Until those that have not begun have, else the rest of the step under way."""
        if not worker.unstarted:
            return step_s(worker, len(worker.active)) / 2 if worker.active else 0.0
        first, tokens = next(iter(worker.unstarted.items()))
        pace = self.pace(worker)
        since_s = max(first.last_submit_s, self._begun_s.get(worker, 0.0))
        return worker.unstarted_tokens / pace - min(now_s - since_s, tokens / pace)

    def _share(self, worker: Worker) -> float:
        pace = self._paces.get(worker)
        return 1.0 if pace is None else pace.share


def step_s(worker: Worker, rows: int) -> float:
    """Of a step of so many decodes: on the line through the measured points beside it."""
    points = worker.status.step_s
    if not points:
        return PRIOR_STEP_S
    index = bisect_left(points, (rows, 0.0))
    if index in (0, len(points)):
        return points[min(index, len(points) - 1)][1]
    (low, low_s), (high, high_s) = points[index - 1], points[index]
    return low_s + (high_s - low_s) * (rows - low) / (high - low)


def load_s(request: Request, worker: Worker) -> float:
    """Until the request's adapter is on the GPU."""
    if not request.version or worker.will_hold(request.version):
        return 0.0
    load = request.adapter_bytes / (
        worker.status.adapter_load_bytes_per_s or PRIOR_LOAD_BYTES_PER_S
    )
    if request.version in worker.host:
        return load
    return load + request.adapter_bytes / PRIOR_FETCH_BYTES_PER_S


def _tokens_per_s(worker: Worker) -> float:
    return worker.status.prefill_tokens_per_s or PRIOR_TOKENS_PER_S


def _contended(worker: Worker) -> bool:
    return len(worker.unstarted) > 1


def _note(errors: Histogram, predicted_s: float | None, true_s: float) -> None:
    if predicted_s is not None and true_s > 0:
        errors.observe(abs(predicted_s - true_s) / true_s)
