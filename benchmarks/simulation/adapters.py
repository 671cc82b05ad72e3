"""The adapters of a modelled worker: which are in its pool, and the loads that bring them there."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from benchmarks.simulation.clock import Clock


class AdapterEvents(Protocol):
    def resident(self, worker_name: str, version: bytes, *, is_resident: bool) -> None: ...


@dataclass(slots=True)
class Pool:
    free: int  # pages


@dataclass(slots=True)
class Resident:
    pages: int
    last_used_step: int
    is_ready: bool = False  # its copy is done


class AdapterCache:
    """Loads run one after another beside the steps; idle adapters go, the least recently used
    first, when their pages are needed."""

    def __init__(
        self,
        worker_name: str,
        clock: Clock,
        pool: Pool,
        events: AdapterEvents,
        *,
        page_bytes: int,
        load_bytes_per_s: float,
        fetch_s: float,
        when_loaded: Callable[[], None],
    ) -> None:
        self.step = 0
        self.rank_sum = 0  # of the distinct adapters in use
        self.sizes: dict[bytes, int] = {}  # bytes, by version
        self.wanted: tuple[bytes, ...] = ()  # next, the most urgent first
        self.pages = 0
        self.num_loads = 0
        self.loaded_bytes = 0
        self._worker_name = worker_name
        self._clock = clock
        self._pool = pool
        self._events = events
        self._page_bytes = page_bytes
        self._load_bytes_per_s = load_bytes_per_s
        self._fetch_s = fetch_s
        self._when_loaded = when_loaded
        self._references: dict[bytes, int] = {}
        self._resident: dict[bytes, Resident] = {}
        self._in_host: set[bytes] = set()
        self._loading_until_s = 0.0

    def acquire(self, version: bytes, rank: int) -> None:
        if version:
            count = self._references.get(version, 0)
            self._references[version] = count + 1
            self.rank_sum += 0 if count else rank

    def release(self, version: bytes, rank: int) -> None:
        if version:
            self._references[version] -= 1
            if not self._references[version]:
                del self._references[version]
                self.rank_sum -= rank
                self._resident[version].last_used_step = self.step

    @property
    def idle_pages(self) -> int:
        """Of adapters that no request uses."""
        used = sum(self.num_pages(version) for version in self._references)
        return self.pages - used

    def num_pages(self, version: bytes) -> int:
        return -(-self.sizes[version] // self._page_bytes)

    def want(self, version: bytes, watermark: int) -> bool:
        """Whether the adapter is resident; if it is absent its load begins, if there is room."""
        resident = self._resident.get(version)
        if resident is None:
            pages = self.num_pages(version)
            if self.make_room(pages + watermark):
                self._load(version, pages)
            return False
        resident.last_used_step = self.step
        return resident.is_ready

    def load_ahead(self, watermark: int) -> None:
        for version in self.wanted:
            self.want(version, watermark)

    def make_room(self, pages: int) -> bool:
        """Evict until so many pages are free; False, and nothing done, if that is impossible."""
        short = pages - self._pool.free
        if short <= 0:
            return True
        idle = sorted(
            (r.last_used_step, v) for v, r in self._resident.items() if self._is_idle(v, r)
        )
        if sum(self._resident[version].pages for _, version in idle) < short:
            return False
        for _, version in idle:
            if self._pool.free >= pages:
                break
            self._evict(version)
        return True

    def check_integrity(self, in_use: Iterable[bytes]) -> None:
        counted = Counter(version for version in in_use if version)
        assert counted == self._references
        assert set(counted) <= set(self._resident)
        assert self.pages == sum(resident.pages for resident in self._resident.values())

    def _is_idle(self, version: bytes, resident: Resident) -> bool:
        """What was asked for in this step is not evicted in it."""
        is_wanted = resident.last_used_step == self.step
        return resident.is_ready and version not in self._references and not is_wanted

    def _load(self, version: bytes, pages: int) -> None:
        self._pool.free -= pages
        self.pages += pages
        self._resident[version] = Resident(pages, self.step)
        self.num_loads += 1
        self.loaded_bytes += self.sizes[version]
        fetched_s = self._clock.now_s + (0.0 if version in self._in_host else self._fetch_s)
        self._in_host.add(version)
        seconds = self.sizes[version] / self._load_bytes_per_s
        self._loading_until_s = max(self._loading_until_s, fetched_s) + seconds
        self._clock.at(self._loading_until_s, lambda: self._loaded(version))

    def _loaded(self, version: bytes) -> None:
        self._resident[version].is_ready = True
        self._events.resident(self._worker_name, version, is_resident=True)
        self._when_loaded()

    def _evict(self, version: bytes) -> None:
        pages = self._resident.pop(version).pages
        self._pool.free += pages
        self.pages -= pages
        self._events.resident(self._worker_name, version, is_resident=False)
