"""Brings adapters nearer to the GPU and makes room in the pool, within one step's plan."""

from lorry.worker.plan import Plan
from lorry.worker.pool import PagePool
from lorry.worker.residency import Adapter, AdapterState, Residency


class AdapterLoader:
    """Fetches, loads and evictions of one step, in the order of who asks first.

    An adapter that was asked for earlier in the step is never evicted for a later one, so the
    oldest request always gets its adapter.
    """

    def __init__(
        self, pool: PagePool, residency: Residency, plan: Plan, *, max_fetches: int
    ) -> None:
        self._pool = pool
        self._residency = residency
        self._plan = plan
        self._fetches_left = max_fetches - residency.num_fetching
        self._protected: set[bytes] = set()

    def want(self, version: bytes, *, watermark: int) -> Adapter | None:
        """Move `version` one stage nearer and return it if it is RESIDENT.

        `watermark` is how many pages a load leaves free.
        """
        self._protected.add(version)
        adapter = self._residency.find(version)
        if adapter is None:
            self._fetch(version)
        elif adapter.state is AdapterState.HOST:
            self._load(adapter, watermark)
        return adapter if adapter and adapter.state is AdapterState.RESIDENT else None

    def make_room(self, pages: int) -> bool:
        """Evict idle adapters until `pages` pages are free; False, and nothing done, if too few."""
        short = pages - self._pool.free
        return short <= 0 or self._evict(short)

    def _fetch(self, version: bytes) -> None:
        if self._fetches_left > 0:
            self._fetches_left -= 1
            self._residency.begin_fetch(version)
            self._plan.fetches.append(version)

    def _load(self, adapter: Adapter, watermark: int) -> None:
        if not self.make_room(adapter.num_pages + watermark):
            return
        self._residency.begin_load(adapter)
        self._plan.loads.append(adapter)

    def _evict(self, pages: int) -> bool:
        """Evict the cheapest idle adapters that together have `pages` pages."""
        if pages > self._residency.idle_pages:
            return False
        victims: list[Adapter] = []
        for adapter in self._residency.idle(self._protected):
            if pages <= 0:
                break
            victims.append(adapter)
            pages -= len(adapter.pages)
        if pages > 0:
            return False
        for adapter in victims:
            self._residency.evict(adapter)
            self._plan.evicted.append(adapter.version)
        return True
