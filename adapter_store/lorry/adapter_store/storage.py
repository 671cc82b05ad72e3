"""A backend as the event loop uses it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar

from lorry.adapter_store.backend import Backend

MAX_CALLS = 16  # at a time

P = ParamSpec("P")
T = TypeVar("T")


class Storage:
    """Runs a backend's calls in threads of their own: one that hangs keeps nothing else waiting."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="backend")

    async def run(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call a method of the backend."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *args, **options))

    def entered(self, manager: AbstractContextManager[T]) -> "InThread[T]":
        """Enter and leave what a method of the backend returned."""
        return InThread(self, manager)

    def close(self) -> None:
        """Wait for the calls under way and close the backend."""
        self._threads.shutdown()
        self.backend.close()


class InThread(Generic[T]):
    """Enters and leaves a context manager that blocks, in a storage's threads."""

    def __init__(self, storage: Storage, manager: AbstractContextManager[T]) -> None:
        self._storage = storage
        self._manager = manager

    async def __aenter__(self) -> T:
        return await self._storage.run(self._manager.__enter__)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._storage.run(self._manager.__exit__, kind, error, traceback)
