"""Verifies every content that the names of a backend refer to, and repairs it from another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crc32c import crc32c

from lorry.adapter_store.backend import Backend
from lorry.adapter_store.copying import PIECE_BYTES, copy_content
from lorry.adapter_store.records import Version
from lorry.rpc.errors import DigestMismatch, VersionNotFound
from lorry.rpc.names import AdapterName


@dataclass(frozen=True, slots=True)
class Entry:
    """A content and who refers to it."""

    version: Version
    names: Sequence[AdapterName]


def entries(backend: Backend) -> list[Entry]:
    """All contents that names refer to."""
    versions: dict[bytes, Version] = {}
    names: dict[bytes, list[AdapterName]] = {}
    for adapter in sorted(backend.load().adapters, key=lambda adapter: adapter.name):
        for version in adapter.versions:
            versions.setdefault(version.digest, version)
            names.setdefault(version.digest, []).append(adapter.name)
    return [Entry(version, names[digest]) for digest, version in versions.items()]


def check(backend: Backend, entry: Entry) -> str | None:
    """What is wrong with a content; None if nothing is. A damaged one is put aside."""
    digest = entry.version.digest
    try:
        with backend.weights(digest) as (content, path):
            if _crc32c(path) == content.file_crc32c:
                return None
    except DigestMismatch:
        return "damaged"
    except (VersionNotFound, FileNotFoundError):
        return "missing"
    backend.quarantine(digest)
    return "damaged"


def repair(backend: Backend, entry: Entry, *, copy: Backend) -> None:
    """Take a content from another backend; raises DigestMismatch or VersionNotFound."""
    key = copy_content(copy, backend, entry.names[0], entry.version, lambda _: None)
    backend.drop_upload(key)


def _crc32c(path: Path) -> int:
    checksum = 0
    for piece in _pieces(path):
        checksum = crc32c(piece, checksum)
    return checksum


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
