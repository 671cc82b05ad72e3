"""Makes room in the pool: gives up what nobody uses, the least worth keeping first.

What is worth little costs little to have again for its bytes, and was not used for long: in steps,
not seconds, so that the same requests lead to the same evictions.
"""

import heapq
from collections.abc import Collection, Iterator
from operator import itemgetter

from lorry.worker.plan import Plan
from lorry.worker.pool import PagePool
from lorry.worker.prefix_cache import PrefixCache
from lorry.worker.residency import Adapter, Residency

# Microseconds to have a page of 2 MiB again, of an 8B model on an H200: a copy at 45 GB/s, the
# same after a fetch from another host at 1 GB/s, and 16 tokens of a prompt at 27,000 tokens/s.
ADAPTER_WITH_IMAGE_US = 50
ADAPTER_WITHOUT_IMAGE_US = 2000
PREFIX_US = 600

# Steps since it was used for what it costs, negative; and a cached page or an adapter.
Candidate = tuple[float, int | Adapter]


class Room:
    """What one step's plan may give up; evicted adapters are listed in the plan."""

    def __init__(
        self,
        pool: PagePool,
        residency: Residency,
        prefixes: PrefixCache,
        plan: Plan,
        step: int,
    ) -> None:
        self._pool = pool
        self._residency = residency
        self._prefixes = prefixes
        self._plan = plan
        self._step = step

    def can_make(self, pages: int, keep: Collection[int] = ()) -> bool:
        """Whether `pages` pages are free or could be, cached pages in `keep` untouched."""
        available = self._pool.free + len(self._prefixes.idle) + self._residency.spare_pages
        if pages > available:
            return False
        return pages + sum(page in self._prefixes.idle for page in keep) <= available

    def make(self, pages: int, keep: Collection[int] = ()) -> bool:
        """Evict until `pages` pages are free; False, and nothing done, if that is impossible."""
        short = pages - self._pool.free
        if short <= 0:
            return True
        if not self.can_make(pages, keep):
            return False
        adapters, cached = self._victims(short, keep)
        for adapter in adapters:
            self._residency.evict(adapter)
            self._plan.evicted.append(adapter.version)
        self._prefixes.evict(cached)
        return True

    def _victims(self, pages: int, keep: Collection[int]) -> tuple[list[Adapter], list[int]]:
        """The first adapters and cached pages to go that make `pages` pages free together."""
        adapters, cached = list[Adapter](), list[int]()
        candidates = heapq.merge(
            self._adapters(has_image=True, cost_us=ADAPTER_WITH_IMAGE_US),
            self._adapters(has_image=False, cost_us=ADAPTER_WITHOUT_IMAGE_US),
            self._cached_pages(keep),
            key=itemgetter(0),
        )
        for _, victim in candidates:
            if isinstance(victim, int):
                cached.append(victim)
                pages -= 1
            else:
                adapters.append(victim)
                pages -= victim.num_pages
            if pages <= 0:
                break
        assert pages <= 0, f"{pages} pages short"
        return adapters, cached

    def _adapters(self, *, has_image: bool, cost_us: float) -> Iterator[Candidate]:
        for adapter in self._residency.spare():
            if has_image == (adapter.image is not None):
                yield (adapter.last_used_step - self._step) / cost_us, adapter

    def _cached_pages(self, keep: Collection[int]) -> Iterator[Candidate]:
        kept = set(keep)
        for page, last_used_step in self._prefixes.idle.items():
            if page not in kept:
                yield (last_used_step - self._step) / PREFIX_US, page
