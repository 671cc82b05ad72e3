"""When requests are to have ended."""

import heapq
from collections.abc import Iterator, Mapping

from lorry.worker.request import Request

SPARE_DEADLINES = 64  # that may be held beside twice as many as there are requests


class Deadlines:
    """The deadlines of `requests`, and of some that have ended since."""

    def __init__(self, requests: Mapping[int, Request]) -> None:
        self._requests = requests
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        if request.deadline_s is not None:
            heapq.heappush(self._heap, (request.deadline_s, request.number))

    def expired(self, now_s: float) -> Iterator[Request]:
        """Requests whose deadline has passed, each once; the caller ends them."""
        while self._heap and self._heap[0][0] <= now_s:
            _, number = heapq.heappop(self._heap)
            if request := self._requests.get(number):
                yield request

    def forget_ended(self) -> None:
        """Let go of requests that have ended, once they are the most that is held."""
        if len(self._heap) > 2 * len(self._requests) + SPARE_DEADLINES:
            self._heap = [entry for entry in self._heap if entry[1] in self._requests]
            heapq.heapify(self._heap)
