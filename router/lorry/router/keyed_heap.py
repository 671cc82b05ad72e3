"""A priority queue of items whose keys change while they wait."""

import heapq
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=tuple[Any, ...])

MIN_ENTRIES = 64  # that are kept without looking which are out of date


class KeyedHeap(Generic[T, K]):
    """`key` tells an item's key now, the least first: a tuple that ends with the item; None: the
    item is not in line.

    A key that becomes smaller, or is not None any more, must be told by `touch`. One that becomes
    greater or None is found out when its item comes to the front, so that most changes cost
    nothing.
    """

    def __init__(self, key: Callable[[T], K | None]) -> None:
        self._key = key
        self._entries: list[K] = []
        self._current: dict[T, K] = {}  # each item's one entry that counts
        self._max_entries = MIN_ENTRIES

    def touch(self, item: T) -> None:
        key = self._key(item)
        current = self._current.get(item)
        if key is not None and (current is None or key < current):
            self._current[item] = key
            heapq.heappush(self._entries, key)
            if len(self._entries) > self._max_entries:
                self._rebuild()

    def least(self) -> K | None:
        """The least key of all items in line; None if there is none."""
        entries, current = self._entries, self._current
        while entries:
            stored = entries[0]
            item = stored[-1]
            if current.get(item) is not stored:
                heapq.heappop(entries)
                continue
            key = self._key(item)
            if key == stored:
                return stored
            if key is None:
                heapq.heappop(entries)
                del current[item]
            else:
                current[item] = key
                heapq.heapreplace(entries, key)
        return None

    def _rebuild(self) -> None:
        """Drop what is out of date, so seldom that it costs each push the same."""
        keys = {item: self._key(item) for item in self._current}
        self._current = {item: key for item, key in keys.items() if key is not None}
        self._entries = list(self._current.values())
        heapq.heapify(self._entries)
        self._max_entries = 2 * len(self._entries) + MIN_ENTRIES
