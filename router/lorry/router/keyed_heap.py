"""A priority queue of items whose keys change while they wait."""

import heapq
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MIN_ENTRIES = 64  # that are kept without looking which are out of date


class KeyedHeap(Generic[T]):
    """`key` tells an item's key now, the least first; None: the item is not in line.

    A key that becomes smaller, or is not None any more, must be told by `touch`. One that becomes
    greater or None is found out when its item comes to the front, so that most changes cost
    nothing.
    """

    def __init__(self, key: Callable[[T], Any]) -> None:
        self._key = key
        self._entries: list[tuple[Any, int, T]] = []
        self._stored: dict[T, Any] = {}  # the key of each item's one entry that counts
        self._num_entries = 0  # ever made: the older one goes first among equals
        self._max_entries = MIN_ENTRIES

    def touch(self, item: T) -> None:
        key = self._key(item)
        stored = self._stored.get(item)
        if key is not None and (stored is None or key < stored):
            self._push(item, key)

    def first(self) -> T | None:
        """The item with the least key."""
        while self._entries:
            stored, _, item = self._entries[0]
            if self._stored.get(item) != stored:
                heapq.heappop(self._entries)
                continue
            key = self._key(item)
            if key == stored:
                return item
            heapq.heappop(self._entries)
            del self._stored[item]
            if key is not None:
                self._push(item, key)
        return None

    def _push(self, item: T, key: Any) -> None:
        self._stored[item] = key
        self._num_entries += 1
        heapq.heappush(self._entries, (key, self._num_entries, item))
        if len(self._entries) > self._max_entries:
            self._rebuild()

    def _rebuild(self) -> None:
        """Drop what is out of date, so seldom that it costs each push the same."""
        keys = {item: self._key(item) for item in self._stored}
        self._stored = {item: key for item, key in keys.items() if key is not None}
        self._entries = [
            (key, number, item) for number, (item, key) in enumerate(self._stored.items())
        ]
        heapq.heapify(self._entries)
        self._max_entries = 2 * len(self._entries) + MIN_ENTRIES
