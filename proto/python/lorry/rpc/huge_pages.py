"""Huge pages for files in shared memory, whatever their file system was mounted with.

To map 80 MiB in small pages takes longer than to copy it: each of 20,000 is entered into the tables
of every process that reads it. A system that is asked for huge pages of a part of a file (Linux 6.1
or newer) gives them even where files get none by themselves, as in /dev/shm.
"""

import ctypes
import logging
import mmap
import os
import weakref
from typing import Any

HUGE_PAGE_BYTES = 2 << 20
MADV_COLLAPSE, MAP_FIXED = 25, 0x10  # of sys/mman.h
FAILED = ctypes.c_void_p(-1).value  # MAP_FAILED

log = logging.getLogger(__name__)
_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def allocate(descriptor: int, num_bytes: int) -> None:
    """Give a new file zeroed memory, in huge pages as far as there are some; raises OSError."""
    os.ftruncate(descriptor, num_bytes)
    whole_bytes = num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if whole_bytes:
        for offset in range(0, whole_bytes, HUGE_PAGE_BYTES):
            os.pwrite(descriptor, b"\0", offset)  # where there is nothing, nothing is made huge
        _collapse(_mapped(descriptor, whole_bytes))
    os.posix_fallocate(descriptor, 0, num_bytes)


def map_file(descriptor: int, num_bytes: int) -> memoryview:
    """A file's first bytes, read-only; unmapped with the last view of them. Raises OSError."""
    return memoryview(_mapped(descriptor, num_bytes)).toreadonly()


def _mapped(descriptor: int, num_bytes: int) -> "ctypes.Array[ctypes.c_ubyte]":
    """At a multiple of a huge page's size: elsewhere a file is mapped in small pages."""
    reserved_bytes = num_bytes + HUGE_PAGE_BYTES
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    reserved = _map(None, reserved_bytes, 0, anonymous, -1)
    try:
        start = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        _map(start, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, descriptor)
        content = (ctypes.c_ubyte * num_bytes).from_address(start)
        unmap = weakref.finalize(content, _libc.munmap, reserved, reserved_bytes)
    except BaseException:
        _libc.munmap(reserved, reserved_bytes)
        raise
    unmap.atexit = False  # threads that still read it outlive the interpreter's last steps
    return content


def _map(address: int | None, num_bytes: int, protection: int, flags: int, descriptor: int) -> int:
    mapped = _libc.mmap(address, num_bytes, protection, flags, descriptor, 0)
    if mapped == FAILED:
        raise OSError(ctypes.get_errno(), f"{num_bytes} bytes cannot be mapped")
    assert isinstance(mapped, int)
    return mapped


def _collapse(content: "ctypes.Array[ctypes.c_ubyte]") -> None:
    """Ask for huge pages; what gets none keeps its small ones."""
    if _libc.madvise(ctypes.addressof(content), len(content), MADV_COLLAPSE):
        reason = os.strerror(ctypes.get_errno())
        log.debug("%d bytes of shared memory get no huge pages: %s", len(content), reason)
