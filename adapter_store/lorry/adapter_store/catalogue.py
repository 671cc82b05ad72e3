"""The names of all tenants as they are now, and the changes that led there.

Revisions count changes from 1 on and are never reused. Watchers hold a revision, not a queue: one
that falls behind the changes kept here must list again. Where several stores share a backend, it
decides whose change comes first, and each learns the others' in the order of their revisions.
"""

import asyncio
import bisect
import contextlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import NamedTuple

from lorry.adapter_store.backend import Loaded, Outdated, Position
from lorry.adapter_store.label_index import Label, LabelIndex
from lorry.adapter_store.records import Adapter, Change, Published
from lorry.adapter_store.storage import Storage
from lorry.adapter_store.tasks import Tasks
from lorry.rpc.errors import Draining, RevisionCompacted, StoreUnavailable
from lorry.rpc.names import AdapterName

CHANGES_KEPT = 10_000
CHANGES_PER_UPDATE = 200  # of at most 5 KB each, for messages under 2 MiB
HEARTBEAT_S = 10.0
MAX_ATTEMPTS = 100  # at a change that other stores come before again and again

Edit = Callable[[Adapter | None], Adapter | None]
log = logging.getLogger(__name__)


class WatchUpdate(NamedTuple):
    """Changes for a watcher, who then knows everything up to `revision`."""

    revision: int
    changes: list[Change]
    snapshot_complete: bool = True


class Catalogue:
    """Owns the names; all changes of this store go through `change`, one at a time."""

    def __init__(self, storage: Storage, loaded: Loaded) -> None:
        self._storage, self._backend = storage, storage.backend
        self._changed = asyncio.Event()  # replaced at each change
        self._one_at_a_time = asyncio.Lock()
        self._tasks = Tasks()
        self._closed = False
        self._reset(loaded)

    @property
    def num_adapters(self) -> int:
        return len(self._names)

    def get(self, name: AdapterName) -> Adapter | None:
        return self._adapters.get(name)

    def after(
        self,
        name: AdapterName | None,
        *,
        tenant: str | None = None,
        labels: Collection[Label] = (),
    ) -> Iterator[Adapter]:
        """Adapters in the order of their names, from the first after `name`.

        Of one tenant, or of all if it is None, and those that have all of the labels.
        """
        names = sorted(self._labels.find(labels, tenant)) if labels else self._names
        start = 0 if name is None else bisect.bisect_right(names, name)
        if tenant is not None:
            start = max(start, bisect.bisect_left(names, (tenant,)))
        for place in range(start, len(names)):
            if tenant is not None and names[place].tenant != tenant:
                return
            yield self._adapters[names[place]]

    def adapters_of(self, tenant: str) -> int:
        return self._adapters_of[tenant]

    def bytes_of(self, tenant: str) -> int:
        """Of the weights of all versions of a tenant's adapters."""
        return self._bytes_of[tenant]

    def refers_to(self, digest: bytes) -> bool:
        return self._references[digest] > 0

    def published(self, upload: str) -> Published | None:
        """What an upload has become, as long as its name keeps that version."""
        name = self._uploads.get(upload)
        if name is None:
            return None
        adapter = self._adapters[name]
        return Published(next(v for v in adapter.versions if v.upload == upload), adapter)

    async def find_published(self, upload: str) -> Published | None:
        """The same, also if another store has just published it."""
        published = self.published(upload)
        if published is None:
            await self.catch_up()
            published = self.published(upload)
        return published

    async def change(self, name: AdapterName, edit: Edit) -> Change:
        """Replace what a name is by what `edit` makes of it, durably.

        What `edit` raises leaves everything as it was; the same again takes no new revision.
        """
        return await self._tasks.finish(self._change(name, edit))

    async def catch_up(self, *, wait: bool = False) -> None:
        """Learn what other stores have changed; with `wait`, rather a moment later than nothing."""
        if not self._backend.shared:
            return
        read = self._backend.wait_for_changes if wait else self._backend.changes
        more = True
        while more:
            store_id, position = self.store_id, self._position
            try:
                changes = await self._storage.run(read, position)
            except RevisionCompacted:
                log.warning("changes after revision %s are not known any more", self.revision)
                self._reset(await self._storage.run(self._backend.load))
                return
            if store_id == self.store_id:
                for change in changes:
                    if change.revision > self.revision:
                        self._apply(change)
            more, read = bool(changes), self._backend.changes

    async def watch(self, store_id: str, after: int) -> AsyncIterator[WatchUpdate]:
        """Changes after a revision, or with revision 0 all adapters and then the changes.

        Raises RevisionCompacted if the changes after it are not known, Draining at `close`.
        """
        if after == 0:
            after = self.revision
            for update in self._snapshot():
                yield update
        else:
            if after > self.revision:
                await self.catch_up()
            self._check_store_id(store_id)
            self._since(after)  # raises if they are not known
            yield WatchUpdate(after, [])
        store_id = self.store_id
        while True:
            changed = self._changed
            changes = self._since(after)
            if not changes:
                await _wait(changed)
                self._check_store_id(store_id)
                changes = self._since(after)
            after = changes[-1].revision if changes else after
            yield WatchUpdate(after, changes)

    async def close(self) -> None:
        """End the watchers and finish the changes under way."""
        self._closed = True
        self._changed.set()
        await self._tasks.close()

    async def _change(self, name: AdapterName, edit: Edit) -> Change:
        async with self._one_at_a_time:
            for _ in range(MAX_ATTEMPTS):
                await self.catch_up()
                store_id, before = self.store_id, self.get(name)
                after = edit(before)
                if after is before:
                    return Change(self.revision, name, after)
                try:
                    change = await self._storage.run(self._backend.commit, name, before, after)
                except Outdated:
                    continue
                await self._learn(change, store_id)
                return change
        raise StoreUnavailable(f"other stores keep changing {name}", retry_after_s=1.0)

    async def _learn(self, change: Change, store_id: str) -> None:
        """Apply a change of this store, which is durable, after those before it."""
        if store_id == self.store_id and change.revision == self.revision + 1:
            self._apply(change)
        elif store_id != self.store_id or change.revision > self.revision:
            with contextlib.suppress(StoreUnavailable):  # it comes once the backend is back
                await self.catch_up()

    @property
    def _position(self) -> Position:
        return Position(self.revision, self._changes[-1].commit if self._changes else "")

    def _reset(self, loaded: Loaded) -> None:
        """Begin anew with everything that the backend holds."""
        self.store_id = loaded.store_id
        self.revision = loaded.position.revision
        self._adapters: dict[AdapterName, Adapter] = {}
        self._names: list[AdapterName] = []  # sorted
        self._labels = LabelIndex()
        self._references: Counter[bytes] = Counter()  # names that hold each version
        self._uploads: dict[str, AdapterName] = {}  # by the keys of what brought their versions
        self._adapters_of: Counter[str] = Counter()  # by tenant
        self._bytes_of: Counter[str] = Counter()  # of weights, by tenant
        self._changes = deque(loaded.changes, CHANGES_KEPT)  # the last ones up to `revision`
        for adapter in sorted(loaded.adapters, key=lambda adapter: adapter.name):
            self._put(adapter.name, adapter)
        self._tell()

    def _apply(self, change: Change) -> None:
        assert change.revision == self.revision + 1, f"{change.revision} after {self.revision}"
        self._put(change.name, change.adapter)
        self.revision = change.revision
        self._changes.append(change)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _put(self, name: AdapterName, adapter: Adapter | None) -> None:
        before = self._adapters.pop(name, None)
        for each, sign in ((before, -1), (adapter, 1)):
            if each is not None:
                self._adapters_of[name.tenant] += sign
                self._bytes_of[name.tenant] += sign * sum(v.weights_bytes for v in each.versions)
        if before is not None:
            self._labels.remove(before)
            self._references.subtract(version.digest for version in before.versions)
            for version in before.versions:
                del self._uploads[version.upload]
        if adapter is not None:
            self._labels.add(adapter)
            self._adapters[name] = adapter
            self._references.update(version.digest for version in adapter.versions)
            self._uploads.update((version.upload, name) for version in adapter.versions)
        if before is None and adapter is not None:
            bisect.insort(self._names, name)
        elif before is not None and adapter is None:
            del self._names[bisect.bisect_left(self._names, name)]

    def _snapshot(self) -> list[WatchUpdate]:
        everything = [Change(self.revision, adapter.name, adapter) for adapter in self.after(None)]
        starts = range(0, max(1, len(everything)), CHANGES_PER_UPDATE)
        return [
            WatchUpdate(
                self.revision, everything[start : start + CHANGES_PER_UPDATE], start == starts[-1]
            )
            for start in starts
        ]

    def _check_store_id(self, store_id: str) -> None:
        if store_id != self.store_id:
            raise RevisionCompacted(f"the revision belongs to another store than {store_id!r}")

    def _since(self, revision: int) -> list[Change]:
        """The next changes after `revision`."""
        if self._closed:
            raise Draining("the store is shutting down", retry_after_s=1.0)
        known_from = self.revision - len(self._changes)
        if not known_from <= revision <= self.revision:
            raise RevisionCompacted(
                f"changes after revision {revision} are not known; list again",
                revision=revision,
                knownFromRevision=known_from,
            )
        first = revision - known_from
        return list(itertools.islice(self._changes, first, first + CHANGES_PER_UPDATE))


async def _wait(changed: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HEARTBEAT_S):
            await changed.wait()
