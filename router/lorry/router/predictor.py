"""When a request gets its first token, and how fast the others follow.

What a worker measures of itself (the time of a step by rows, what a prompt token adds to it, the
rate of adapter loads) gives the time of a request alone. How fast those ahead of it go is learned:
see `lorry.router.pace`. Until something is measured, priors stand for it that promise too much
rather than too little, since what is promised too little is aborted.
"""

import math
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field

from lorry.router.pace import Pace
from lorry.router.request import Request
from lorry.router.stretch import Stretch
from lorry.router.worker import Worker
from lorry.rpc.histogram import Histogram

PRIOR_TOKENS_PER_S = 20_000.0
PRIOR_STEP_S = 0.01
PRIOR_LOAD_BYTES_PER_S = 10e9  # from host memory to the GPU
PRIOR_FETCH_BYTES_PER_S = 1e9  # from the adapter store to host memory
PASSED_STEPS = 3.5  # after which one was passed over: two that were under way, and its own
ERRORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)  # shares of the true time


@dataclass(slots=True)
class PredictionErrors:
    """|predicted - true| / true, of times to first token."""

    at_arrival: Histogram = field(default_factory=lambda: Histogram(ERRORS))
    at_submit: Histogram = field(default_factory=lambda: Histogram(ERRORS))


class Learned:
    """What its requests tell of one worker."""

    def __init__(self, now_s: float) -> None:
        self.pace = Pace(now_s)
        self.stretch = Stretch()
        self.begun_s = 0.0  # when a request began there last
        self.begun_tokens = 0  # of prompts, since the pilot's last token


class Predictor:
    """Hears what happens at the workers; every method but `service_s` and those below changes
    only what it has learned."""

    def __init__(self) -> None:
        self.errors = PredictionErrors()
        self.pilots: dict[Request, Worker] = {}  # whose tokens are told by `draw`
        self._learned: dict[Worker, Learned] = {}

    def forget(self, worker: Worker) -> None:
        learned = self._learned.pop(worker, None)
        if learned is not None and learned.stretch.pilot is not None:
            del self.pilots[learned.stretch.pilot]

    def advance(self, worker: Worker, now_s: float) -> Learned:
        """To be called before what the worker has to do changes."""
        learned = self._learned.get(worker)
        if learned is None:
            learned = self._learned[worker] = Learned(now_s)
        contended = self._is_contended(worker, now_s)
        learned.pace.advance(now_s, contended=contended, tokens_per_s=_tokens_per_s(worker))
        return learned

    def begin(self, request: Request, worker: Worker, now_s: float) -> None:
        """The request's first token has come; `worker` still counts it among the unstarted."""
        learned = self.advance(worker, now_s)
        learned.begun_s = now_s
        num_tokens = worker.unstarted.get(request, 0)
        learned.begun_tokens += num_tokens
        learned.pace.begin(num_tokens, now_s)
        _note(self.errors.at_arrival, request.predicted_ttft_s, now_s - request.arrival_s)
        _note(self.errors.at_submit, request.predicted_service_s, now_s - request.last_submit_s)
        if learned.stretch.pilot is None:
            self._follow(request, worker)

    def draw(self, pilot: Request, now_s: float) -> None:
        """A pilot has had a token after its first, or some."""
        worker = self.pilots[pilot]
        learned = self._learned[worker]
        rows = max(1, len(worker.active) - len(worker.unstarted))
        prompts_s = learned.begun_tokens / _tokens_per_s(worker)
        learned.stretch.draw(step_s(worker, rows), prompts_s, now_s)
        learned.begun_tokens = 0

    def leave(self, request: Request) -> None:
        """The request is no more at its worker, which knows it no longer; another is the pilot if
        it was."""
        worker = self.pilots.pop(request, None)
        if worker is not None:
            begun = (each for each in worker.active.values() if each not in worker.unstarted)
            self._follow(next(begun, None), worker)

    def service_s(self, request: Request, worker: Worker, now_s: float) -> float:
        """From a submit now to the first token."""
        own_tokens, learned = request.num_known_tokens, self._learned.get(worker)
        ready_s = max(self._ahead_s(worker, learned, own_tokens, now_s), load_s(request, worker))
        own_s = own_tokens / _tokens_per_s(worker) + step_s(worker, len(worker.active) + 1)
        return ready_s + _latest_stretch(learned) * own_s

    def pace(self, worker: Worker) -> float:
        """Prompt tokens per second of requests that it begins while others wait: as learned, and
        no more than its steps have left."""
        learned = self._learned.get(worker)
        pace = _tokens_per_s(worker) * (1.0 if learned is None else learned.pace.share)
        return min(pace, _left_tokens(worker) / self.tpot_s(worker))

    def wait_s(self, num_tokens: float, workers: Collection[Worker]) -> float:
        """Until the workers have begun requests of so many prompt tokens."""
        rate = sum(map(self.pace, workers))
        return num_tokens / rate if rate else 0.0

    def tpot_s(self, worker: Worker) -> float:
        """Of all that run there, with one more request."""
        learned = self._learned.get(worker)
        stretch = 1.0 if learned is None else learned.stretch.mean
        return stretch * step_s(worker, len(worker.active) + 1)

    def _follow(self, pilot: Request | None, worker: Worker) -> None:
        self._learned[worker].stretch.follow(pilot)
        if pilot is not None:
            self.pilots[pilot] = worker

    def _ahead_s(
        self, worker: Worker, learned: Learned | None, own_tokens: int, now_s: float
    ) -> float:
        """The rest of the step under way, then until those that have not begun have, and steps
        have room for so many tokens."""
        if not worker.active:
            return 0.0
        stretch = _latest_stretch(learned)
        rest_s = stretch * step_s(worker, len(worker.active)) / 2
        if not worker.unstarted_tokens:
            return rest_s
        full_steps = (worker.unstarted_tokens + own_tokens) // _left_tokens(worker)
        steps_s = full_steps * step_s(worker, len(worker.active))
        steps_s += worker.unstarted_tokens / _tokens_per_s(worker)
        wait_s = max(stretch * steps_s, worker.unstarted_tokens / self.pace(worker))
        first, tokens = next(iter(worker.unstarted.items()))
        begun_s = 0.0 if learned is None else learned.begun_s
        since_s = now_s - max(first.last_submit_s, begun_s)
        return rest_s + wait_s - min(since_s, wait_s * tokens / worker.unstarted_tokens)

    def _is_contended(self, worker: Worker, now_s: float) -> bool:
        """Whether some wait there that steps have passed over."""
        if len(worker.unstarted) < 2:
            return False
        oldest = next(iter(worker.unstarted))
        return now_s - oldest.last_submit_s > PASSED_STEPS * self.tpot_s(worker)


def step_s(worker: Worker, rows: int) -> float:
    """Of a step of so many decodes: on the line through the measured points beside it; each row
    beyond them adds what a prompt token does, as each adds at least: a point may be of a time when
    the machine had less to do."""
    points = worker.status.step_s
    if not points:
        return PRIOR_STEP_S
    index = bisect_left(points, (rows, 0.0))
    if index == 0:
        return points[0][1]
    first, first_s = points[0]
    low, low_s = points[index - 1]
    row_s = 1.0 / _tokens_per_s(worker)
    if index == len(points):
        seconds = low_s + (rows - low) * row_s
    else:
        high, high_s = points[index]
        seconds = low_s + (high_s - low_s) * (rows - low) / (high - low)
    return max(seconds, first_s + (rows - first) * row_s)


def lone_step_s(worker: Worker) -> float:
    """Of a step of one decode, which none is shorter than; 0: not measured yet."""
    points = worker.status.step_s
    return points[0][1] if points and points[0][0] == 1 else 0.0


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


def _latest_stretch(learned: Learned | None) -> float:
    return 1.0 if learned is None else learned.stretch.latest


def _tokens_per_s(worker: Worker) -> float:
    return worker.status.prefill_tokens_per_s or PRIOR_TOKENS_PER_S


def _left_tokens(worker: Worker) -> float:
    """Of a step, for prompts."""
    if not worker.step_tokens:
        return math.inf
    num_decoding = worker.usage.places - len(worker.unstarted)
    return max(1, worker.step_tokens - num_decoding)


def _note(errors: Histogram, predicted_s: float | None, true_s: float) -> None:
    if predicted_s is not None and true_s > 0:
        errors.observe(abs(predicted_s - true_s) / true_s)
