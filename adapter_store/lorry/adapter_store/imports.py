"""The watched import directory: what is put there is published under its directory's name.

WAITING ──> IMPORTED      a directory whose files change, or can be read again, is WAITING anew
    └─────> FAILED
"""

import asyncio
import contextlib
import enum
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorry.adapter_store.import_scan import Found, opened, scan
from lorry.adapter_store.ingest import Source, ingest
from lorry.adapter_store.store import Store
from lorry.rpc.errors import (
    AdapterNotFound,
    EtagMismatch,
    LorryError,
    StoreFull,
    StoreUnavailable,
    TenantLimit,
)
from lorry.rpc.names import AdapterName
from lorry.rpc.repeated_log import RepeatedLog

PERIOD_S = 2.0  # files that have not changed for so long are taken
TRY_AGAIN_S = 60.0
PASSING = (EtagMismatch, StoreFull, StoreUnavailable, TenantLimit)

log = logging.getLogger(__name__)


class ImportState(enum.Enum):
    WAITING = "waiting"
    IMPORTED = "imported"
    FAILED = "failed"


TRANSITIONS: Mapping[ImportState, frozenset[ImportState]] = {
    ImportState.WAITING: frozenset({ImportState.IMPORTED, ImportState.FAILED}),
    ImportState.IMPORTED: frozenset({ImportState.WAITING}),
    ImportState.FAILED: frozenset({ImportState.WAITING}),
}


@dataclass(eq=False, slots=True)
class Import:
    """One directory, as it was seen last."""

    found: Found
    state: ImportState = ImportState.WAITING
    error: str = ""  # with FAILED
    version: bytes = b""  # with IMPORTED
    try_again_s: float | None = None  # with FAILED, where that may pass; monotonic

    def move_to(self, state: ImportState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.found.path}: {self.state} to {state}"
        self.state = state

    def fail(self, error: str, *, try_again_s: float | None = None) -> None:
        self.error, self.try_again_s = error, try_again_s
        self.move_to(ImportState.FAILED)
        log.warning("%s is not imported: %s", self.found.path, error)


class Imports:
    """Owns the states of all directories; imports them one at a time."""

    def __init__(self, store: Store, root: Path | None, *, delete: bool) -> None:
        """With `delete` a name goes when its directory does, unless it has changed meanwhile."""
        self._store, self._delete = store, delete
        self._root = None if root is None else root.resolve()
        self._imports: dict[str, Import] = {}
        self._failures = RepeatedLog(log)

    @property
    def all(self) -> list[Import]:
        """By path."""
        return [self._imports[path] for path in sorted(self._imports)]

    async def run(self) -> None:
        """Look again and again, for as long as the store runs."""
        while self._root is not None:
            try:
                await self.look()
                self._failures.worked()
            except (OSError, LorryError) as error:
                self._failures.failed(str(error), logging.ERROR, "import: %s", error)
            except Exception as error:
                kind, message = repr(error), "looking for imports failed; it is tried again"
                self._failures.failed(kind, logging.ERROR, message, traceback_of=error)
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> None:
        """Import what has not changed since the last look; raises OSError."""
        assert self._root is not None
        found = {each.path: each for each in await asyncio.to_thread(scan, self._root)}
        for path in self._imports.keys() - found.keys():
            await self._gone(self._imports.pop(path))
        for path, each in found.items():
            known = self._imports.get(path)
            if known is None or known.found != each:
                self._imports[path] = self._seen(each)
            elif known.state is ImportState.WAITING:
                await self._import(known)
            elif known.try_again_s is not None and time.monotonic() >= known.try_again_s:
                known.move_to(ImportState.WAITING)

    def _seen(self, found: Found) -> Import:
        """A directory that is new or has changed."""
        seen = Import(found)
        if found.problem:
            seen.fail(found.problem)
        return seen

    async def _import(self, each: Import) -> None:
        try:
            each.version = await self._publish(each.found)
        except PASSING as error:
            each.fail(str(error), try_again_s=time.monotonic() + TRY_AGAIN_S)
        except (LorryError, OSError) as error:
            each.fail(str(error))
        except Exception:  # of this directory; the others are imported all the same
            log.exception("unexpected error in the import of %s", each.found.path)
            each.fail("unexpected error; see the log of the store")
        else:
            each.move_to(ImportState.IMPORTED)
            log.info("%s is imported as version %s", each.found.path, each.version.hex())

    async def _publish(self, found: Found) -> bytes:
        assert found.name is not None
        source = await asyncio.to_thread(self._open, found.name)
        try:
            return (await ingest(self._store, found.name, source)).version
        finally:
            os.close(source.weights)

    def _open(self, name: AdapterName) -> Source:
        assert self._root is not None
        most = self._store.limits.max_weights_bytes
        with (
            opened(self._root) as top,
            opened(name.tenant, parent=top) as tenant,
            opened(name.adapter, parent=tenant) as directory,
        ):
            return Source.open(directory, most)

    async def _gone(self, each: Import) -> None:
        """Its directory is gone."""
        name = each.found.name
        if not self._delete or name is None or each.state is not ImportState.IMPORTED:
            return
        adapter = self._store.catalogue.get(name)
        if adapter is None or adapter.published != each.version:
            return
        try:
            await self._store.delete(name, adapter.etag, allow_missing=True)
        except (AdapterNotFound, EtagMismatch):
            return
        log.info("%s is deleted, as its directory is", name)


@contextlib.asynccontextmanager
async def importing(store: Store, root: Path | None, *, delete: bool) -> AsyncIterator[Imports]:
    """The imports of a directory, if there is one, for as long as the block runs."""
    imports = Imports(store, root, delete=delete)
    task = asyncio.create_task(imports.run())
    try:
        yield imports
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
