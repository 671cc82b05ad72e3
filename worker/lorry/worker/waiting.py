"""The requests that have no pages yet, in an order that costs nothing for those that cannot start.

A request whose adapter has no image stands in the line of its version. Of a line nobody looks at
more than the first request, and at that only to have the image fetched. The others are at hand.
"""

import bisect
import heapq
from collections.abc import Iterator

from lorry.worker.adapter_loader import AdapterLoader
from lorry.worker.request import NO_ROW, Request
from lorry.worker.residency import AdapterState, Residency


class WaitingRequests:
    """All lists are by number."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._num_waiting = 0
        self._at_hand: list[Request] = []  # had an image, or needed none, when last looked at
        self._lines: dict[bytes, list[Request]] = {}  # by version
        self._unfetched: list[Request] = []  # first of the lines whose image nobody fetches yet

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        yield from self._at_hand
        for line in self._lines.values():
            yield from line

    def add(self, request: Request) -> None:
        self._num_waiting += 1
        if self._has_image(request.version):
            _insert(self._at_hand, request)
        else:
            self._line_up(request)

    def remove(self, request: Request) -> None:
        self._num_waiting -= 1
        if not _discard(self._at_hand, request):
            self._leave_line(request)

    def of(self, version: bytes) -> list[Request]:
        """Those that need `version`."""
        at_hand = [request for request in self._at_hand if request.version == version]
        return sorted([*at_hand, *self._lines.get(version, ())], key=number_of)

    def in_order(self, loader: AdapterLoader) -> Iterator[Request]:
        """Those at hand, and the first of as many lines as `loader` has fetches for; oldest first.

        Requests may be added, removed and parked meanwhile.
        """
        unfetched = self._unfetched[: loader.fetches_left]
        return heapq.merge(list(self._at_hand), unfetched, key=number_of)

    def park(self, request: Request) -> None:
        """Note that `request` was found without an image, or that a fetch of it has begun."""
        if self._has_image(request.version):
            return
        if _discard(self._at_hand, request):
            self._line_up(request)
        elif self._residency.find(request.version):
            _discard(self._unfetched, request)

    def unpark(self, version: bytes) -> None:
        """The image of `version` is there."""
        if line := self._lines.pop(version, None):
            _discard(self._unfetched, line[0])
            self._at_hand = list(heapq.merge(self._at_hand, line, key=number_of))

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is where its adapter is."""
        lists = [self._at_hand, *self._lines.values()]
        assert self._num_waiting == sum(len(requests) for requests in lists)
        for requests in [*lists, self._unfetched]:
            numbers = [request.number for request in requests]
            assert numbers == sorted(set(numbers)), "not in the order of their arrival"
        for version, line in self._lines.items():
            assert line, f"the line of {version.hex()} is empty"
            assert not self._has_image(version), f"{version.hex()} has an image"
            if self._residency.find(version) is None:
                assert line[0] in self._unfetched, f"nobody would fetch {version.hex()}"
        assert all(request.row == NO_ROW for request in self)
        assert all(first is self._lines[first.version][0] for first in self._unfetched)

    def _has_image(self, version: bytes) -> bool:
        adapter = self._residency.find(version)
        return not version or (adapter is not None and adapter.state is not AdapterState.FETCHING)

    def _line_up(self, request: Request) -> None:
        line = self._lines.setdefault(request.version, [])
        if line:
            _discard(self._unfetched, line[0])
        _insert(line, request)
        self._note_first(line)

    def _leave_line(self, request: Request) -> None:
        line = self._lines[request.version]
        _discard(self._unfetched, line[0])
        _discard(line, request)
        if line:
            self._note_first(line)
        else:
            del self._lines[request.version]

    def _note_first(self, line: list[Request]) -> None:
        if self._residency.find(line[0].version) is None:
            _insert(self._unfetched, line[0])


def number_of(request: Request) -> int:
    return request.number


def _insert(requests: list[Request], request: Request) -> None:
    bisect.insort(requests, request, key=number_of)


def _discard(requests: list[Request], request: Request) -> bool:
    """Whether `request` was among them."""
    index = bisect.bisect_left(requests, request.number, key=number_of)
    is_there = index < len(requests) and requests[index] is request
    if is_there:
        del requests[index]
    return is_there
