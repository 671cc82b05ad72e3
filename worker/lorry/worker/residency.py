"""Where each adapter version is, and which may go.

    ABSENT ──► FETCHING ──► HOST ──► LOADING ──► RESIDENT
      ▲           │         │  ▲                    │
      └───────────┴─────────┴──┴────────────────────┘

HOST means that the engine has mapped the page image. It may keep the image while RESIDENT, to load
again without a fetch: eviction leads to HOST if the image is kept, else to ABSENT. A load that has
begun is always finished, so pages stay owned until their copy is done.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lorry.worker.messages import ImageReady, ResidencyChange
from lorry.worker.pool import PagePool

NO_SLOT = -1


class AdapterState(enum.Enum):
    ABSENT = enum.auto()
    FETCHING = enum.auto()  # the front was asked for the image
    HOST = enum.auto()
    LOADING = enum.auto()  # has pages and a slot; its copy runs
    RESIDENT = enum.auto()  # the next step may use it


S = AdapterState
TRANSITIONS: Mapping[AdapterState, frozenset[AdapterState]] = {
    S.ABSENT: frozenset({S.FETCHING}),
    S.FETCHING: frozenset({S.HOST, S.ABSENT}),
    S.HOST: frozenset({S.LOADING, S.ABSENT}),
    S.LOADING: frozenset({S.RESIDENT}),
    S.RESIDENT: frozenset({S.HOST, S.ABSENT}),
}


class IllegalTransition(RuntimeError):
    def __init__(self, version: bytes, source: AdapterState, target: AdapterState) -> None:
        super().__init__(f"adapter {version.hex()}: {source.name} -> {target.name}")


@dataclass(slots=True, eq=False)
class Adapter:
    """One version that the engine has heard of."""

    version: bytes
    state: AdapterState = AdapterState.ABSENT
    image: ImageReady | None = None  # what the front fetched, while the engine may map it
    num_pages: int = 0  # known from the first image on
    pages: list[int] = field(default_factory=list)
    slot: int = NO_SLOT
    references: int = 0  # running requests
    pinned: bool = False
    resident_since_s: float = 0.0
    last_used_step: int = 0  # when it became RESIDENT, or its last request left it

    @property
    def is_idle(self) -> bool:
        return self.state is S.RESIDENT and not self.references and not self.pinned

    @property
    def is_on_its_way(self) -> bool:
        return self.state is S.FETCHING or self.state is S.LOADING

    def move_to(self, target: AdapterState) -> None:
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransition(self.version, self.state, target)
        self.state = target


class Residency:
    """Owns slots and the adapters' pages; every method is bookkeeping, copies are the engine's.

    There are as many slots as pages, so only memory limits the number of adapters.
    """

    def __init__(self, pool: PagePool) -> None:
        self.num_fetching = 0
        self.pinned_pages = 0
        self._idle: dict[bytes, Adapter] = {}  # longest idle first
        self._idle_pages = 0
        self._step = 0
        self._protected: set[bytes] = set()
        self._protected_idle_pages = 0
        self._pool = pool
        self._adapters: dict[bytes, Adapter] = {}
        self._free_slots = list(range(pool.total - 1, -1, -1))
        self._changes = ResidencyChange([], [], [], [])

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def find(self, version: bytes) -> Adapter | None:
        """The adapter of `version`; None if it is ABSENT."""
        return self._adapters.get(version)

    def set_pinned(self, adapter: Adapter, pinned: bool) -> None:
        """Keep a RESIDENT adapter from eviction, or no longer."""
        assert adapter.state is S.RESIDENT, f"{adapter.version.hex()} is {adapter.state.name}"
        if adapter.pinned != pinned:
            adapter.pinned = pinned
            self._note_idleness(adapter)
            self.pinned_pages += adapter.num_pages if pinned else -adapter.num_pages

    def begin_fetch(self, version: bytes) -> Adapter:
        adapter = self._adapters[version] = Adapter(version)
        adapter.move_to(S.FETCHING)
        self.num_fetching += 1
        return adapter

    def finish_fetch(self, adapter: Adapter, image: ImageReady) -> None:
        adapter.move_to(S.HOST)
        self.num_fetching -= 1
        adapter.image, adapter.num_pages = image, image.pages
        self._changes.host_added.append(adapter.version)

    def fail_fetch(self, adapter: Adapter) -> None:
        adapter.move_to(S.ABSENT)
        self.num_fetching -= 1
        del self._adapters[adapter.version]

    def begin_load(self, adapter: Adapter) -> None:
        """Give a HOST adapter pages and a slot; the caller has made room for both."""
        adapter.move_to(S.LOADING)
        adapter.pages = self._pool.allocate_adapter(adapter.num_pages)
        adapter.slot = self._free_slots.pop()

    def finish_load(self, adapter: Adapter, now_s: float) -> None:
        adapter.move_to(S.RESIDENT)
        adapter.resident_since_s = now_s
        adapter.last_used_step = self._step
        self._note_idleness(adapter)
        self._changes.gpu_added.append(adapter.version)

    def acquire(self, adapter: Adapter) -> None:
        """Count one more running request of a RESIDENT adapter."""
        assert adapter.state is S.RESIDENT, f"{adapter.version.hex()} is {adapter.state.name}"
        adapter.references += 1
        self._note_idleness(adapter)

    def release(self, adapter: Adapter) -> None:
        """Count one less; the last one leaves it idle."""
        adapter.references -= 1
        adapter.last_used_step = self._step
        self._note_idleness(adapter)

    def begin_step(self, step: int) -> None:
        """Forget which adapters the last step protected."""
        self._step = step
        self._protected.clear()
        self._protected_idle_pages = 0

    def protect(self, version: bytes) -> None:
        """Keep an adapter from eviction for the rest of the step."""
        if version not in self._protected:
            self._protected.add(version)
            if adapter := self._idle.get(version):
                self._protected_idle_pages += adapter.num_pages

    def evict(self, adapter: Adapter) -> None:
        """Free an idle adapter's pages and slot."""
        assert adapter.is_idle, f"{adapter.version.hex()} is in use"
        self._set_idle(adapter, False)
        self._pool.release(adapter.pages)
        self._free_slots.append(adapter.slot)
        adapter.pages, adapter.slot = [], NO_SLOT
        self._changes.gpu_removed.append(adapter.version)
        if adapter.image is not None:
            adapter.move_to(S.HOST)
        else:
            adapter.move_to(S.ABSENT)
            del self._adapters[adapter.version]

    def drop_image(self, adapter: Adapter) -> None:
        """Forget the mapped image; an adapter that is only in HOST becomes ABSENT."""
        adapter.image = None
        self._changes.host_removed.append(adapter.version)
        if adapter.state is S.HOST:
            adapter.move_to(S.ABSENT)
            del self._adapters[adapter.version]

    def spare(self) -> Iterator[Adapter]:
        """What the step may evict, longest idle first."""
        return (a for a in self._idle.values() if a.version not in self._protected)

    @property
    def idle_pages(self) -> int:
        return self._idle_pages

    @property
    def spare_pages(self) -> int:
        return self._idle_pages - self._protected_idle_pages

    def _note_idleness(self, adapter: Adapter) -> None:
        if adapter.is_idle != (adapter.version in self._idle):
            self._set_idle(adapter, adapter.is_idle)

    def _set_idle(self, adapter: Adapter, is_idle: bool) -> None:
        if is_idle:
            self._idle[adapter.version] = adapter
        else:
            del self._idle[adapter.version]
        pages = adapter.num_pages if is_idle else -adapter.num_pages
        self._idle_pages += pages
        if adapter.version in self._protected:
            self._protected_idle_pages += pages

    def take_changes(self) -> ResidencyChange | None:
        """What changed since the last call; None if nothing did."""
        changes, self._changes = self._changes, ResidencyChange([], [], [], [])
        lists = (changes.gpu_added, changes.gpu_removed, changes.host_added, changes.host_removed)
        return changes if any(lists) else None

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, pages and states agree."""
        with_pages = [a for a in self if a.state in (S.LOADING, S.RESIDENT)]
        slots = [adapter.slot for adapter in with_pages]
        assert len(set(slots)) == len(slots), "a slot has two adapters"
        assert not set(slots) & set(self._free_slots), "a slot in use is free"
        assert [a for a in self if a.is_idle] == [a for a in self if a.version in self._idle]
        assert self._idle_pages == sum(adapter.num_pages for adapter in self._idle.values())
        assert self.spare_pages == sum(adapter.num_pages for adapter in self.spare())
        for adapter in self:
            has_pages = adapter.state in (S.LOADING, S.RESIDENT)
            assert bool(adapter.pages) == has_pages, f"{adapter.state.name} with wrong pages"
            assert adapter.references >= 0
            assert adapter.state is S.RESIDENT or not adapter.references, "evicted while in use"
