"""Files of a shared-memory directory that processes of one host hand to each other by name."""

import os
import stat
from pathlib import Path

from lorry.rpc.huge_pages import map_file

SHM_DIR = Path(f"/dev/shm/lorry-{os.geteuid()}")  # of the store, unless it is told otherwise
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SharedFileRefused(ValueError):
    """The name is not that of a regular file of the expected size in the directory."""


def shm_namespace_id(directory: Path) -> str:
    """``<boot id>:<device number>``: equal for two processes only if they see the same directory.

    Empty if there is none, which equals no other's.
    """
    try:
        return f"{BOOT_ID.read_text().strip()}:{directory.stat().st_dev}"
    except OSError:
        return ""


def open_shared(directory: Path, name: str, num_bytes: int) -> memoryview:
    """Map a whole file read-only; raises SharedFileRefused.

    The mapping stays valid after the file is unlinked, and goes with the last view of it.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise SharedFileRefused(f"{name!r} is not a plain file name")
    try:
        descriptor = os.open(
            directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
    except OSError as error:
        raise SharedFileRefused(f"{name!r} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SharedFileRefused(f"{name!r} is not a regular file")
        if status.st_size != num_bytes:
            raise SharedFileRefused(f"{name!r} has {status.st_size} bytes, not {num_bytes}")
        return map_file(descriptor, num_bytes)
    finally:
        os.close(descriptor)
