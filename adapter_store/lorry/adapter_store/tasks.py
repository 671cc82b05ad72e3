"""Work that must come to its end once begun, whether or not the caller who began it stays."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """Owns tasks until they end; `close` waits for them."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end even if the caller is cancelled meanwhile."""
        return await asyncio.shield(self.start(work))

    @contextlib.asynccontextmanager
    async def beside(self, work: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
        """Run `work` beside the block, which ends when both have."""
        task = self.start(work)
        try:
            yield
        finally:
            await task

    async def close(self) -> None:
        """Wait for what runs; its callers have its errors."""
        while self._running:
            await asyncio.wait(self._running)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone
