"""A directory of page images in shared memory, which several processes may share.

Each prefixes its files with its own instance, whose lock file it holds; what an instance without a
holder left behind is removed by the next one that starts. That works across containers, which share
memory but no process numbers.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from lorry.rpc.errors import StoreFull, StoreUnavailable
from lorry.rpc.huge_pages import allocate

RETRY_AFTER_S = 1.0  # others may have freed memory by then
STARTING = "starting.lock"  # held while an instance cleans up and takes its own lock
LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class SharedDirectory:
    """Owns its instance's files in a directory for as long as it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _make_ours(path)
        self._instance = secrets.token_hex(8)
        with _opened_lock(path / STARTING) as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            self._remove_leftovers()
            self._lock = os.open(self._lock_path(self._instance), LOCK_FLAGS, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def create(self, num_bytes: int) -> Path:
        """A zeroed file under a temporary name, with its memory reserved; raises StoreFull."""
        path = self.path / f"{self._instance}.new.{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            allocate(descriptor, num_bytes)
        except OSError as error:
            path.unlink()
            kind = StoreFull if error.errno == errno.ENOSPC else StoreUnavailable
            text = f"no {num_bytes} bytes of shared memory in {self.path}: {error.strerror}"
            raise kind(text, retry_after_s=RETRY_AFTER_S) from error
        finally:
            os.close(descriptor)
        return path

    def publish(self, temporary: Path, name: str) -> Path:
        """Give a finished file its name, for reading only."""
        temporary.chmod(0o440)
        return temporary.rename(self.path / f"{self._instance}.{name}")

    def withdraw(self, path: Path) -> Path:
        """Free a file's name for the next one; what is returned is still to be removed."""
        withdrawn = self.path / f"{self._instance}.old.{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(withdrawn)
        return withdrawn

    def remove(self, path: Path) -> None:
        """Unlink a file; whoever maps it keeps it."""
        path.unlink(missing_ok=True)

    def close(self) -> None:
        self._remove(self._instance)
        os.close(self._lock)

    def _remove_leftovers(self) -> None:
        for lock_path in self.path.glob("*.lock"):
            if lock_path.name == STARTING:
                continue
            with _opened_lock(lock_path) as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove(lock_path.stem)

    def _remove(self, instance: str) -> None:
        """Unlink an instance's files, its lock last."""
        for path in self.path.glob(f"{instance}.*"):
            if path != self._lock_path(instance):
                path.unlink(missing_ok=True)
        self._lock_path(instance).unlink(missing_ok=True)

    def _lock_path(self, instance: str) -> Path:
        return self.path / f"{instance}.lock"


@contextlib.contextmanager
def _opened_lock(path: Path) -> Iterator[int]:
    descriptor = os.open(path, LOCK_FLAGS, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_ours(path: Path) -> None:
    """Refuse a directory in which others could put files: /dev/shm is everybody's."""
    try:
        path.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"directory {path} cannot be made: {error.strerror}") from error
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is not a directory")
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"directory {path} must be owned and writable by this user only")
