"""What lies in an import directory, ``TENANT/ADAPTER/`` with an adapter's two files each.

Links are never followed. Names that begin with a dot are for what is still being written.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lorry.adapter_store.ingest import CONFIG_NAME, WEIGHTS_NAME
from lorry.rpc.errors import InvalidRequest
from lorry.rpc.names import AdapterName, check_id

MAX_DIRECTORIES = 20_000
FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# Inode, size and time of the last change of each file: equal as long as nobody writes.
Fingerprint = tuple[tuple[int, int, int], ...]


class Found(NamedTuple):
    """A directory that is, or should be, an adapter's."""

    path: str  # below the import directory, printable
    name: AdapterName | None = None
    fingerprint: Fingerprint = ()
    problem: str = ""  # why it cannot be imported as it is


def scan(root: Path) -> list[Found]:
    """In the order of their paths, at most `MAX_DIRECTORIES`; blocks. Raises OSError."""
    found: list[Found] = []
    with opened(root) as top:
        for tenant in _names(top):
            found += _scan_tenant(top, tenant, room=MAX_DIRECTORIES - len(found))
    return found


@contextlib.contextmanager
def opened(path: Path | str, *, parent: int | None = None) -> Iterator[int]:
    """A descriptor of a directory that is no link."""
    descriptor = os.open(path, FLAGS, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _scan_tenant(top: int, tenant: str, *, room: int) -> list[Found]:
    try:
        check_id(tenant, field="directory")
        with opened(tenant, parent=top) as directory:
            return [_look(directory, tenant, name) for name in _names(directory)[:room]]
    except (OSError, InvalidRequest) as error:
        return [Found(_shown(tenant), problem=_problem(error))][:room]


def _look(tenant_directory: int, tenant: str, adapter: str) -> Found:
    path = _shown(f"{tenant}/{adapter}")
    try:
        name = AdapterName(tenant, check_id(adapter, field="directory"))
        with opened(adapter, parent=tenant_directory) as directory:
            return Found(path, name, _fingerprint(directory))
    except (OSError, InvalidRequest) as error:
        return Found(path, problem=_problem(error))


def _fingerprint(directory: int) -> Fingerprint:
    found = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "is not a regular file", name)
        found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _names(directory: int) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


def _problem(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{_shown(str(error.filename))}: {error.strerror}"
    return str(error)


def _shown(text: str) -> str:
    """Without what could not be printed, or would deceive who reads it."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
