"""A bounded byte ring in shared memory: one process writes records, one other reads them.

The ring is a memfd that both sides map, so nothing has a name and nothing outlives the processes.
Two 64-bit counters, each stored by one side only, tell how many bytes were ever written and read;
a record is its length in 8 bytes, then its bytes, and wraps at the end. An eventfd wakes the
reader.

Ordering: a counter is an aligned 8-byte word that one machine instruction loads or stores. A side
must see a record's bytes before the counter that publishes them. x86-64 keeps stores, and loads, in
program order. Elsewhere the release and acquire of a lock between the two orders them (`_fence`);
it costs about 50 ns, so it is done everywhere.
"""

import fcntl
import mmap
import os
import select
import threading
import time
from typing import NamedTuple

DEFAULT_CAPACITY_BYTES = 16 << 20
LENGTH_BYTES = 8
WRITTEN, READ = 0, 8  # the counters' words, on cache lines of their own
DATA = 128
POLL_S = 0.0005
# From linux/fcntl.h; the reader's mapping must never lose its pages.
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 2, 4


class RingFull(Exception):
    """The reader did not make room in time."""


class RecordTooLarge(ValueError):
    """A record that the ring could not hold even if it were empty."""


class RingHandle(NamedTuple):
    """What another process needs to attach; the descriptors are inherited by number."""

    memory_fd: int
    event_fd: int
    capacity: int

    def __str__(self) -> str:
        return f"{self.memory_fd}:{self.event_fd}:{self.capacity}"

    @classmethod
    def parse(cls, text: str) -> "RingHandle":
        memory_fd, event_fd, capacity = text.split(":")
        return cls(int(memory_fd), int(event_fd), int(capacity))


class Ring:
    """One end of a ring; closing it closes this process's descriptors."""

    def __init__(self, handle: RingHandle) -> None:
        size = os.fstat(handle.memory_fd).st_size
        if size != DATA + handle.capacity:
            raise ValueError(f"ring of {handle.capacity} bytes: its memory has {size} bytes")
        self.handle = handle
        self._mapping = mmap.mmap(handle.memory_fd, size)
        self._counters = memoryview(self._mapping)[:DATA].cast("Q")
        self._data = memoryview(self._mapping)[DATA:]
        self._lock = threading.Lock()
        self._lock.acquire()
        self._poll = select.poll()
        self._poll.register(handle.event_fd, select.POLLIN)

    @classmethod
    def create(cls, capacity: int = DEFAULT_CAPACITY_BYTES) -> "Ring":
        if capacity <= LENGTH_BYTES:
            raise ValueError(f"capacity must be above {LENGTH_BYTES}, got {capacity}")
        memory_fd = os.memfd_create("lorry-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory_fd, DATA + capacity)
        fcntl.fcntl(memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
        event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return cls(RingHandle(memory_fd, event_fd, capacity))

    @classmethod
    def attach(cls, memory_fd: int, event_fd: int, capacity: int) -> "Ring":
        """The other end of a ring whose descriptors this process inherited."""
        return cls(RingHandle(memory_fd, event_fd, capacity))

    def close(self) -> None:
        self._counters.release()
        self._data.release()
        self._mapping.close()
        os.close(self.handle.memory_fd)
        os.close(self.handle.event_fd)

    # The writer

    def try_write(self, record: bytes) -> bool:
        """Write a record unless there is no room for it now."""
        size = LENGTH_BYTES + len(record)
        if size > self.handle.capacity:
            raise RecordTooLarge(f"a record of {len(record)} bytes in {self.handle.capacity}")
        written = self._counters[WRITTEN]
        if written + size - self._counters[READ] > self.handle.capacity:
            return False
        self._fence()  # the reader is done with the bytes before we write over them
        self._store(written, len(record).to_bytes(LENGTH_BYTES, "little"))
        self._store(written + LENGTH_BYTES, record)
        self._fence()
        self._counters[WRITTEN] = written + size
        os.eventfd_write(self.handle.event_fd, 1)
        return True

    def write(self, record: bytes, timeout_s: float) -> None:
        """Write a record, waiting for room; raises RingFull after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.try_write(record):
            if time.monotonic() > deadline:
                raise RingFull(f"no room for {len(record)} bytes in {timeout_s} s")
            time.sleep(POLL_S)

    # The reader

    def wait(self, timeout_s: float) -> bool:
        """Wait until there may be something to read; an event loop watches `fileno` instead."""
        return bool(self._poll.poll(timeout_s * 1000))

    def fileno(self) -> int:
        """Readable once something was written since the last `read_all`."""
        return self.handle.event_fd

    def read_all(self) -> list[bytes]:
        """Every record written so far."""
        self._clear_event()  # before the counter is read, so that no later record goes unnoticed
        position, written = self._counters[READ], self._counters[WRITTEN]
        self._fence()
        records = []
        while position < written:
            length = int.from_bytes(self._load(position, LENGTH_BYTES), "little")
            records.append(self._load(position + LENGTH_BYTES, length))
            position += LENGTH_BYTES + length
        self._fence()
        self._counters[READ] = position
        return records

    def _clear_event(self) -> None:
        try:
            os.eventfd_read(self.handle.event_fd)
        except BlockingIOError:
            return

    def _store(self, position: int, data: bytes) -> None:
        start = position % self.handle.capacity
        first = min(len(data), self.handle.capacity - start)
        self._data[start : start + first] = data[:first]
        self._data[: len(data) - first] = data[first:]

    def _load(self, position: int, length: int) -> bytes:
        start = position % self.handle.capacity
        first = min(length, self.handle.capacity - start)
        return bytes(self._data[start : start + first]) + bytes(self._data[: length - first])

    def _fence(self) -> None:
        """Keep what comes before in program order ahead of what comes after, for other cores too.

        A release that precedes an acquire in program order is never reordered with it, nor earlier
        accesses with the release or later ones with the acquire.
        """
        self._lock.release()
        self._lock.acquire()
