"""The shared-memory directory: its files appear complete, read-only, and are only ever unlinked."""

import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path

from lorry.rpc.errors import StoreFull, StoreUnavailable

LOCK = "lock"


class SharedDirectory:
    """Owns a directory's files for as long as it is open; clears it at both ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o750, parents=True, exist_ok=True)
        _check_ours(path)
        self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o640)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(f"shm_dir {path} is in use by another store") from None
        self._clear()

    def create(self, num_bytes: int) -> Path:
        """A zeroed file under a temporary name, with its memory reserved; raises StoreFull."""
        path = self.path / f".{secrets.token_hex(16)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            path.unlink()
            kind = StoreFull if error.errno == errno.ENOSPC else StoreUnavailable
            raise kind(f"no {num_bytes} bytes of shared memory: {error.strerror}") from error
        finally:
            os.close(descriptor)
        return path

    def publish(self, temporary: Path, name: str) -> Path:
        """Give a finished file its name, for reading only."""
        temporary.chmod(0o440)
        return temporary.rename(self.path / name)

    def remove(self, path: Path) -> None:
        """Unlink a file; whoever maps it keeps it."""
        path.unlink(missing_ok=True)

    def close(self) -> None:
        self._clear()
        os.close(self._lock)

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.name != LOCK:
                path.unlink()


def _check_ours(path: Path) -> None:
    """Refuse a directory in which others could put files: /dev/shm is everybody's."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"shm_dir {path} is not a directory")
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"shm_dir {path} must be owned and writable by this user only")
