"""Brings adapters nearer to the GPU, within one step's plan."""

from lorry.worker.plan import Plan
from lorry.worker.residency import Adapter, AdapterState, Residency
from lorry.worker.room import Room


class AdapterLoader:
    """Fetches and loads of one step, in the order of who asks first.

    An adapter that was asked for earlier in the step is never evicted for a later one, so the
    oldest request always gets its adapter.
    """

    def __init__(self, residency: Residency, room: Room, plan: Plan, *, max_fetches: int) -> None:
        self._residency = residency
        self._room = room
        self._plan = plan
        self._awaited: set[bytes] = set()  # found so already, since many requests may ask
        self.fetches_left = max(0, max_fetches - residency.num_fetching)

    def want(self, version: bytes, *, watermark: int) -> Adapter | None:
        """Move `version` one stage nearer and return it if it is RESIDENT.

        `watermark` is how many pages a load leaves free.
        """
        self._residency.protect(version)
        adapter = self._residency.find(version)
        if adapter is None:
            self._fetch(version)
        elif adapter.state is AdapterState.HOST:
            self._load(adapter, watermark)
        return adapter if adapter and adapter.state is AdapterState.RESIDENT else None

    def must_wait_for(self, version: bytes) -> bool:
        """Whether `version` has no image yet or is on its way, so that no step can have it.

        Without an image it is fetched, if a fetch is free. The base model is always there.
        """
        if not version or version in self._awaited:
            return bool(version)
        adapter = self._residency.find(version)
        if adapter is None:
            self._fetch(version)
        elif not adapter.is_on_its_way:
            return False
        self._awaited.add(version)
        return True

    def _fetch(self, version: bytes) -> None:
        if self.fetches_left > 0:
            self.fetches_left -= 1
            self._residency.begin_fetch(version)
            self._plan.fetches.append(version)

    def _load(self, adapter: Adapter, watermark: int) -> None:
        if not self._room.make(adapter.num_pages + watermark):
            return
        self._residency.begin_load(adapter)
        self._plan.loads.append(adapter)
