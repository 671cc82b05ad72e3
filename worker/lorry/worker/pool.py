"""Which page of the unified pool belongs to whom: KV from the low end, adapters from the high end.

Pure bookkeeping: page numbers only. Page 0 is a dummy that padded rows may write.
"""

import enum
import heapq
from collections.abc import Iterable, Mapping

import numpy as np

DUMMY_PAGE = 0


class PageUse(enum.IntEnum):
    FREE = 0
    KV = 1  # of one sequence
    PREFIX = 2  # of the prefix cache, which lends it to sequences
    ADAPTER = 3
    DUMMY = 4


class PagePool:
    """Allocates pages 1 to `num_pages` - 1 of a pool of `num_pages`."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages must be at least 2, got {num_pages}")
        self._use = np.full(num_pages, PageUse.FREE, dtype=np.int8)
        self._use[DUMMY_PAGE] = PageUse.DUMMY
        # Every free page is in the heap once; an entry whose page went to an adapter is stale.
        self._low = list(range(1, num_pages))
        self._in_low = self._use == PageUse.FREE
        self._count = {use: int((self._use == use).sum()) for use in PageUse}

    @property
    def total(self) -> int:
        """Pages that can be allocated."""
        return len(self._use) - 1

    @property
    def free(self) -> int:
        return self._count[PageUse.FREE]

    @property
    def kv(self) -> int:
        return self._count[PageUse.KV]

    @property
    def prefix(self) -> int:
        return self._count[PageUse.PREFIX]

    @property
    def adapter(self) -> int:
        return self._count[PageUse.ADAPTER]

    def allocate_kv(self, count: int) -> list[int]:
        """The lowest `count` free pages; there must be as many."""
        assert count <= self.free, f"{count} pages of {self.free}"
        pages: list[int] = []
        while len(pages) < count:
            lowest = np.array([heapq.heappop(self._low) for _ in range(count - len(pages))])
            self._in_low[lowest] = False
            lowest = lowest[self._use[lowest] == PageUse.FREE]
            self._use[lowest] = PageUse.KV
            pages += lowest.tolist()
        self._count[PageUse.FREE] -= count
        self._count[PageUse.KV] += count
        return pages

    def allocate_adapter(self, count: int) -> list[int]:
        """`count` free pages in ascending order: the highest run that is long enough, if any."""
        assert count <= self.free, f"{count} pages of {self.free}"
        free = np.flatnonzero(self._use == PageUse.FREE)
        run_ends = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        first = int(run_ends[-1]) if len(run_ends) else len(free) - count
        pages = free[first : first + count]
        self._use[pages] = PageUse.ADAPTER
        self._count[PageUse.FREE] -= count
        self._count[PageUse.ADAPTER] += count
        return [int(page) for page in pages]

    def turn_into_prefix(self, pages: list[int]) -> None:
        """Sequences' pages become the prefix cache's, content and numbers unchanged."""
        assert (self._use[pages] == PageUse.KV).all(), f"not all of {pages} are KV"
        self._use[pages] = PageUse.PREFIX
        self._count[PageUse.KV] -= len(pages)
        self._count[PageUse.PREFIX] += len(pages)

    def release(self, pages: Iterable[int]) -> None:
        """Free pages of any use."""
        freed = np.fromiter(pages, dtype=np.int64)
        counts = np.bincount(self._use[freed], minlength=len(PageUse))
        for use in (PageUse.FREE, PageUse.DUMMY):
            assert not counts[use], f"of {freed.tolist()} one is {use.name}"
        for use in (PageUse.KV, PageUse.PREFIX, PageUse.ADAPTER):
            self._count[use] -= int(counts[use])
        self._use[freed] = PageUse.FREE
        self._count[PageUse.FREE] += len(freed)
        for page in freed[~self._in_low[freed]].tolist():
            heapq.heappush(self._low, page)
        self._in_low[freed] = True

    def check_integrity(self, pages_by_use: Mapping[PageUse, Iterable[int]]) -> None:
        """Raise AssertionError unless the owners' pages are exactly those in use, each once."""
        for use in (PageUse.KV, PageUse.PREFIX, PageUse.ADAPTER):
            owned = sorted(pages_by_use.get(use, ()))
            assert len(set(owned)) == len(owned), f"a {use.name} page has two owners"
            in_use = np.flatnonzero(self._use == use).tolist()
            assert owned == in_use, f"{use.name} pages {in_use} in use, {owned} owned"
            assert self._count[use] == len(owned)
        assert self.free + self.kv + self.prefix + self.adapter == self.total
        free = np.flatnonzero(self._use == PageUse.FREE)
        assert bool(self._in_low[free].all()), "a free page is not in the heap"
