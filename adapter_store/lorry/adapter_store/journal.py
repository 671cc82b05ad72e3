"""The catalogue on disk: one file, whose first line is a snapshot and each further one a change.

A line is the CRC-32C of its JSON and the JSON. A change counts once its line is synchronised, so a
crash leaves at most one torn line at the end, which is dropped. The file is rewritten, by an atomic
rename, when changes outnumber adapters.
"""

import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crc32c import crc32c

from lorry.adapter_store.durable import write_durably
from lorry.adapter_store.records import Adapter, Change, adapter_from_json, adapter_to_json
from lorry.rpc.errors import StoreFull, StoreUnavailable
from lorry.rpc.names import AdapterName

MIN_CHANGES = 1000

log = logging.getLogger(__name__)


class JournalDamaged(ValueError):
    """A line other than the last does not match its checksum."""


class Journal:
    """Owns the file; the only writer of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            write_durably(path, _line({"revision": 0, "adapters": []}))
        lines, good_bytes = _read(path)
        self.base_revision: int = lines[0]["revision"]
        self.snapshot = [adapter_from_json(fields) for fields in lines[0]["adapters"]]
        self.changes = [_change(line) for line in lines[1:]]
        self.revision = self.base_revision
        self._adapters = {adapter.name: adapter for adapter in self.snapshot}
        for change in self.changes:
            self._apply(change)
        self._open(good_bytes)

    @property
    def adapters(self) -> Mapping[AdapterName, Adapter]:
        """As they are now."""
        return self._adapters

    def append(self, change: Change) -> None:
        """Make a change durable; raises StoreFull or StoreUnavailable, and then it never was."""
        if self._broken:
            raise StoreUnavailable("the catalogue could not be written; restart the store")
        self._write(_line(_change_to_json(change)))
        self._apply(change)
        self._num_changes += 1
        if self._num_changes > max(MIN_CHANGES, len(self._adapters)):
            self._rewrite(change.revision)

    def close(self) -> None:
        os.close(self._descriptor)

    def _open(self, good_bytes: int) -> None:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        self._end = good_bytes
        self._broken = False
        self._num_changes = len(self.changes)
        os.ftruncate(self._descriptor, good_bytes)

    def _write(self, line: bytes) -> None:
        try:
            written = os.pwrite(self._descriptor, line, self._end)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            self._undo()
            kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreUnavailable
            raise kind(f"the catalogue cannot be written: {error.strerror}") from error
        self._end += len(line)

    def _undo(self) -> None:
        """Take back a line that may or may not have reached the disk."""
        self._broken = True
        os.ftruncate(self._descriptor, self._end)
        os.fsync(self._descriptor)
        self._broken = False

    def _rewrite(self, revision: int) -> None:
        adapters = [adapter_to_json(adapter) for adapter in self._adapters.values()]
        content = _line({"revision": revision, "adapters": adapters})
        try:
            write_durably(self._path, content)
        except OSError as error:
            log.warning("the catalogue could not be compacted: %s", error)
            self._broken = not os.path.samestat(os.fstat(self._descriptor), self._path.stat())
            return
        os.close(self._descriptor)
        self.changes = []
        self._open(len(content))

    def _apply(self, change: Change) -> None:
        self.revision = change.revision
        if change.adapter is None:
            self._adapters.pop(change.name, None)
        else:
            self._adapters[change.name] = change.adapter


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that count, and their bytes."""
    content = path.read_bytes()
    lines: list[dict[str, Any]] = []
    good_bytes = 0
    for raw in content.splitlines(keepends=True):
        checksum, _, text = raw.rstrip(b"\n").partition(b" ")
        if not raw.endswith(b"\n") or checksum != b"%08x" % crc32c(text):
            if good_bytes + len(raw) < len(content) or not lines:
                raise JournalDamaged(f"{path} is damaged at byte {good_bytes}")
            break
        lines.append(json.loads(text))
        good_bytes += len(raw)
    return lines, good_bytes


def _line(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields, separators=(",", ":")).encode()
    return b"%08x %s\n" % (crc32c(text), text)


def _change_to_json(change: Change) -> dict[str, Any]:
    adapter = None if change.adapter is None else adapter_to_json(change.adapter)
    return {"revision": change.revision, "name": list(change.name), "adapter": adapter}


def _change(fields: dict[str, Any]) -> Change:
    adapter = None if fields["adapter"] is None else adapter_from_json(fields["adapter"])
    return Change(fields["revision"], AdapterName(*fields["name"]), adapter)
