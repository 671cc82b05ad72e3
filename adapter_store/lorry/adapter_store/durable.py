"""Files that survive a power cut: written, synchronised, and only then given their name."""

import contextlib
import errno
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from lorry.rpc.errors import StoreFull, StoreUnavailable

# A kernel that preempts none of its calls gives the processor to nobody else during one. Where a
# virtual machine first gets the memory from its host, a MiB written at once keeps it for 2.4 ms.
WRITE_BYTES = 64 << 10


def write_in_pieces(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of it to an unbuffered file, with room for others between the pieces."""
    view = memoryview(data)
    for start in range(0, len(view), WRITE_BYTES):
        piece = view[start : start + WRITE_BYTES]
        if file.write(piece) != len(piece):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file: after a crash it is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def disk_errors(what: str = "the store's disk") -> Iterator[None]:
    """Raise StoreFull or StoreUnavailable for what the operating system says."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreUnavailable
        raise kind(f"{what} failed: {error.strerror}") from error
