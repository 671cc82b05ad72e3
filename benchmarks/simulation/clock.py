"""Virtual time: what is to happen, in order."""

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """Events of the same time happen in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Have `event` happen at `time_s`, or now if that has passed."""
        heapq.heappush(self._events, (max(time_s, self.now_s), next(self._numbers), event))

    def run(self, is_done: Callable[[], bool]) -> None:
        """Until `is_done` or nothing is left to happen."""
        while self._events and not is_done():
            self.now_s, _, event = heapq.heappop(self._events)
            self.num_events += 1
            event()
