"""A backend as the event loop uses it."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar

from lorry.adapter_store.backend import Backend

MAX_CALLS = 16  # at a time
READ_AHEAD_BYTES = 256 << 10  # at a time: a system reads no more of what it is advised of at once
MAX_FILES = 8  # of weights at a time, which a Redis fills; more than there are builders for them

P = ParamSpec("P")
T = TypeVar("T")


class Storage:
    """Runs a backend's calls in threads of their own: one that hangs keeps nothing else waiting."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.free_files = asyncio.Semaphore(MAX_FILES)
        self._threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="backend")

    async def run(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call a method of the backend."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *args, **options))

    def entered(self, manager: AbstractContextManager[T]) -> "InThread[T]":
        """Enter and leave what a method of the backend returned: a local file of weights."""
        return InThread(self, manager)

    def close(self) -> None:
        """Wait for the calls under way and close the backend."""
        self._threads.shutdown()
        self.backend.close()


class InThread(Generic[T]):
    """Enters and leaves a context manager that blocks, in a storage's threads, in its turn."""

    def __init__(self, storage: Storage, manager: AbstractContextManager[T]) -> None:
        self._storage = storage
        self._manager = manager

    async def __aenter__(self) -> T:
        await self._storage.free_files.acquire()
        try:
            return await self._storage.run(self._manager.__enter__)
        except BaseException:
            self._storage.free_files.release()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._storage.run(self._manager.__exit__, kind, error, traceback)
        finally:
            self._storage.free_files.release()


def read_ahead(path: Path) -> None:
    """Have the system bring a file into its memory while other work goes on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset in range(0, os.fstat(descriptor).st_size, READ_AHEAD_BYTES):
            os.posix_fadvise(descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
