"""A directory of this worker's own in shared memory, for page images that came as chunks.

A lock on the directory lives as long as the process, so that a later worker can tell what a dead
one has left, also across containers that share the memory but not process numbers.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorry.rpc.errors import StoreFull

log = logging.getLogger(__name__)


class LocalImage:
    """A preallocated file; removed when its owner is done."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def write(self, data: bytes, offset: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written


class LocalImages:
    """Makes files that the engine process may map."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._num_created = 0

    @contextlib.contextmanager
    def create(self, version: bytes, num_bytes: int) -> Iterator[LocalImage]:
        """A file of `num_bytes`; raises StoreFull if there is no memory for it."""
        self._num_created += 1
        path = self.directory / f"{version.hex()}-{self._num_created}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.posix_fallocate(descriptor, 0, num_bytes)
            except OSError as error:
                raise StoreFull(
                    f"the worker's {self.directory.parent} has no room for {num_bytes} bytes",
                    bytes=num_bytes,
                ) from error
            yield LocalImage(path, descriptor)
        finally:
            os.close(descriptor)
            path.unlink()


@contextlib.contextmanager
def local_images(parent: Path) -> Iterator[LocalImages]:
    """A fresh directory under `parent`, gone on exit; removes those of dead workers.

    Raises ValueError if there can be none.
    """
    prefix = f"lorry-worker-{os.getuid()}-"
    _remove_leftovers(parent, prefix)
    try:  # not yet under its final name, so that it is never seen without its lock
        fresh = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    except OSError as error:
        raise ValueError(f"local_dir: {error}") from error
    descriptor = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        directory = fresh.rename(fresh.with_name(fresh.name[1:]))
        try:
            yield LocalImages(directory)
        finally:
            shutil.rmtree(directory)
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for directory in parent.glob(f"{prefix}*"):
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # another worker removed it first, or it is not ours
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
            log.info("removed %s, left by a dead worker", directory)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
