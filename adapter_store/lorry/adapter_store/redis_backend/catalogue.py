"""Names, revisions and the stream of changes in Redis."""

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping

from lorry.adapter_store.backend import Outdated, Position
from lorry.adapter_store.records import Adapter, Change, adapter_from_json, adapter_to_json
from lorry.adapter_store.redis_backend.link import RedisLink
from lorry.rpc.errors import RevisionCompacted, StoreUnavailable
from lorry.rpc.names import AdapterName

CHANGES_KEPT = 10_000
CHANGES_PER_READ = 500
NAMES_PER_READ = 500
WAIT_MS = 500  # less than the time limit of an answer
LOAD_ATTEMPTS = 5

log = logging.getLogger(__name__)


class RedisCatalogue:
    """The names of a backend."""

    def __init__(self, link: RedisLink, open_store: Callable[[], str]) -> None:
        self.store_id = open_store()
        self._link = link
        self._open_store = open_store

    def load(self) -> tuple[Position, list[Adapter], list[Change]]:
        """All names, their position, and the last changes up to it.

        Names are read in parts while others may change; the changes since then make up for it.
        """
        for _ in range(LOAD_ATTEMPTS):
            self.store_id = self._open_store()
            begin = self._revision()
            adapters = {adapter.name: adapter for adapter in self._names()}
            changes = list(self._all_changes())
            newest = changes[-1].revision if changes else begin
            if newest < begin or (newest > begin and changes[0].revision > begin + 1):
                continue  # more came meanwhile than are kept
            for change in changes:
                if change.revision > begin:
                    adapters.pop(change.name, None)
                    if change.adapter is not None:
                        adapters[change.name] = change.adapter
            commit = changes[-1].commit if changes else ""
            return Position(newest, commit), list(adapters.values()), changes
        raise StoreUnavailable("the catalogue changes faster than it can be read")

    def commit(self, name: AdapterName, before: Adapter | None, after: Adapter | None) -> Change:
        """One transaction, known by an id, so that it is not done twice if its answer is lost."""
        commit = uuid.uuid4().hex
        had = {version.digest.hex() for version in before.versions} if before else set()
        has = {version.digest.hex() for version in after.versions} if after else set()
        revision = self._link.run(
            "delete" if after is None else "commit",
            commit,
            _key(name),
            before.etag if before else "",
            "" if after is None else json.dumps(adapter_to_json(after)),
            json.dumps(sorted(has - had)),
            json.dumps(sorted(had - has)),
            CHANGES_KEPT,
        )
        if revision == -1:
            raise Outdated(f"{name} was changed by another store")
        if revision == -2:
            raise StoreUnavailable(f"the content of {name} was lost; upload it again")
        return Change(revision, name, after, commit)

    def changes(self, after: Position) -> list[Change]:
        """The next changes, once the one at `after` is seen to be of the same history."""
        store_id, newest, entries = self._link.run("changes", after.revision, CHANGES_PER_READ)
        if store_id.decode() != self.store_id:
            raise RevisionCompacted("another store has seen that Redis lost changes")
        found = [
            _change(entry_id, dict(zip(fields[::2], fields[1::2], strict=True)))
            for entry_id, fields in entries
        ]
        at = found.pop(0) if found and found[0].revision == after.revision else None
        is_other = after.commit != "" and at is not None and at.commit != after.commit
        if int(newest) < after.revision or is_other:
            self._rename_store(after.revision)
        return _next_after(after, found)

    def wait_for_changes(self, after: Position) -> list[Change]:
        changes = self.changes(after)
        if changes:
            return changes
        with self._link.client() as client:
            streams = client.xread(
                {"lorry:events": f"{after.revision}-0"}, count=CHANGES_PER_READ, block=WAIT_MS
            )
        found = [_change(*entry) for _, entries in streams for entry in entries]
        return _next_after(after, found)

    def _rename_store(self, revision: int) -> None:
        """Revisions that were given out are lost or mean something else: they get another store id.

        So do those who know them list everything again.
        """
        log.error("Redis has lost changes up to revision %s; all who watch list again", revision)
        self._link.run("rename_store", self.store_id, uuid.uuid4().hex)
        raise RevisionCompacted("Redis has lost changes")

    def _revision(self) -> int:
        with self._link.client() as client:
            return int(client.get("lorry:revision") or 0)

    def _names(self) -> Iterator[Adapter]:
        cursor = 0
        while True:
            with self._link.client() as client:
                cursor, fields = client.hscan("lorry:adapters", cursor, count=NAMES_PER_READ)
            yield from (adapter_from_json(json.loads(text)) for text in fields.values())
            if not cursor:
                return

    def _all_changes(self) -> Iterator[Change]:
        start = "-"
        while True:
            with self._link.client() as client:
                entries = client.xrange("lorry:events", start, "+", count=CHANGES_PER_READ)
            yield from (_change(*entry) for entry in entries)
            if len(entries) < CHANGES_PER_READ:
                return
            start = f"({entries[-1][0].decode()}"


def _next_after(after: Position, changes: list[Change]) -> list[Change]:
    """The changes, unless some before them are missing."""
    if changes and changes[0].revision != after.revision + 1:
        raise RevisionCompacted("changes are not kept any more")
    return changes


def _key(name: AdapterName) -> str:
    return f"{name.tenant}/{name.adapter}"


def _change(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Change:
    tenant, _, adapter = fields[b"name"].decode().partition("/")
    text = fields[b"adapter"]
    return Change(
        int(entry_id.partition(b"-")[0]),
        AdapterName(tenant, adapter),
        adapter_from_json(json.loads(text)) if text else None,
        fields[b"commit"].decode(),
    )
