"""Which requests are aborted because their objective is out of reach, and what is an overload."""

import math
from typing import Protocol

from lorry.router.request import Request

# S-LoRA's constants: its objective, what it takes a prompt to last, the weight of the newest count
# in its moving averages, and the time of the ten decoding steps between two looks at its queue.
SLORA_TTFT_S = 6.0
SLORA_PREFILL_S = 0.5
SLORA_SMOOTHING = 0.7
SLORA_LOOK_S = 0.4

# Shares of an objective: what one that is late adds to what is kept back, and what one in time
# takes from it, so that one in forty is late where some are at all.
MORE_KEPT_BACK, LESS_KEPT_BACK, MOST_KEPT_BACK = 0.04, 0.001, 0.5
# A first token counts as late here from the first of these shares of the objective on, since its
# way to the client takes time, too, and since whoever waits for one that is past its objective has
# sent many after it by then; if it comes by the second later than was predicted when the request
# was sent, for what was expected asks for no more to be kept back.
LATE, UNEXPECTED = 0.75, 0.1
# What is kept back is forgotten with time, too, as those that are aborted for it never show that
# they need not be.
KEPT_BACK_MEMORY_S = 30.0

OVERLOAD_SHARE = 0.75  # of an arrival's time to first token that what waits takes in an overload


class Admission(Protocol):
    def latest_start_s(self, request: Request, service_s: float) -> float | None:
        """When a request that takes `service_s` to its first token once it is sent is aborted if
        it still waits; None: never."""
        ...

    def arrived(self, request: Request, wait_s: float, now_s: float) -> bool:
        """A request joins those that wait, for `wait_s` in all; whether it may."""
        ...

    def aborted(self, request: Request, now_s: float) -> None: ...

    def planned(self, num_waiting: int, num_submitted: int, now_s: float) -> None:
        """So many wait after so many were sent."""
        ...

    def began(self, request: Request, ttft_s: float) -> None:
        """A request has had its first token."""
        ...

    def is_overloaded(self, now_s: float) -> bool:
        """Whether more waits than can be served in time."""
        ...


class AdmitAll:
    """Nobody is aborted, and nothing is an overload."""

    def latest_start_s(self, request: Request, service_s: float) -> float | None:
        return None

    def arrived(self, request: Request, wait_s: float, now_s: float) -> bool:
        return True

    def aborted(self, request: Request, now_s: float) -> None:
        pass

    def planned(self, num_waiting: int, num_submitted: int, now_s: float) -> None:
        pass

    def began(self, request: Request, ttft_s: float) -> None:
        pass

    def is_overloaded(self, now_s: float) -> bool:
        return False


class EarlyAbort(AdmitAll):
    """Whoever cannot have its first token in time any more is aborted.

    Predictions err, so a share of each objective is kept back: as much as leaves few of those late
    that are admitted. It grows with each that was, and shrinks with each that was not.

    It is an overload when all that are there would take an arrival's time, or nearly, and until
    that has not happened, and nobody was aborted, for as long as a request may wait. With `refuse`,
    an arrival is aborted at once that would be too late behind them: for orders in which it waits
    for them.
    """

    def __init__(self, *, refuse: bool = False) -> None:
        self._refuse = refuse
        self._kept_back = 0.0
        self._planned_s = 0.0
        self._overloaded_until_s = 0.0

    def latest_start_s(self, request: Request, service_s: float) -> float | None:
        ttft_s = request.slo.ttft_s
        if ttft_s is None:
            return None
        return request.arrival_s + (1.0 - self._kept_back) * ttft_s - service_s

    def began(self, request: Request, ttft_s: float) -> None:
        slo_s = request.slo.ttft_s
        if slo_s is None:
            return
        sent_s = request.last_submit_s - request.arrival_s
        unexpected_s = ttft_s - sent_s - (request.predicted_service_s or 0.0)
        is_late = ttft_s > LATE * slo_s and unexpected_s > UNEXPECTED * slo_s
        change = MORE_KEPT_BACK if is_late else -LESS_KEPT_BACK
        self._kept_back = min(MOST_KEPT_BACK, max(0.0, self._kept_back + change))

    def planned(self, num_waiting: int, num_submitted: int, now_s: float) -> None:
        if self._kept_back:
            self._kept_back *= math.exp((self._planned_s - now_s) / KEPT_BACK_MEMORY_S)
        self._planned_s = now_s

    def arrived(self, request: Request, wait_s: float, now_s: float) -> bool:
        ttft_s = request.slo.ttft_s
        if ttft_s is None:
            return True
        if wait_s > OVERLOAD_SHARE * ttft_s:
            self.aborted(request, now_s)
        return not self._refuse or now_s + wait_s <= request.arrival_s + ttft_s

    def aborted(self, request: Request, now_s: float) -> None:
        """Take it as a sign of an overload."""
        ttft_s = request.slo.ttft_s
        if ttft_s is not None:
            self._overloaded_until_s = max(self._overloaded_until_s, now_s + ttft_s)

    def is_overloaded(self, now_s: float) -> bool:
        return now_s < self._overloaded_until_s


class SloraAbort(AdmitAll):
    """S-LoRA's own rule (arXiv 2311.03285, section 4.3, with the constants of its code), to compare
    with: abort what has waited 5.5 s, and go by the newest while more arrive than are taken."""

    def __init__(self) -> None:
        self._look_s = 0.0
        self._last_waiting = 0
        self._taken = 0  # since the last look
        self._arrival_rate = 0
        self._take_rate = 1

    def latest_start_s(self, request: Request, service_s: float) -> float | None:
        if request.slo.ttft_s is None:
            return None
        return request.arrival_s + SLORA_TTFT_S - SLORA_PREFILL_S

    def planned(self, num_waiting: int, num_submitted: int, now_s: float) -> None:
        self._taken += num_submitted
        if now_s < self._look_s:
            return
        self._look_s = now_s + SLORA_LOOK_S
        arrived = num_waiting + self._taken - self._last_waiting
        self._arrival_rate = _smoothed(arrived, self._arrival_rate)
        if self._taken:
            self._take_rate = max(1, _smoothed(self._taken, self._take_rate))
            self._last_waiting = num_waiting
        self._taken = 0

    def is_overloaded(self, now_s: float) -> bool:
        return self._arrival_rate >= self._take_rate


def _smoothed(newest: int, before: int) -> int:
    """Whole numbers, as in S-LoRA's code."""
    return int(SLORA_SMOOTHING * newest + (1 - SLORA_SMOOTHING) * before)
