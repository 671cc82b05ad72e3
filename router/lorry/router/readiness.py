"""Whether the router can serve: a worker is attached and the catalogue is known."""

import asyncio
from collections.abc import Awaitable, Callable


class Readiness:
    def __init__(self) -> None:
        self._num_workers = 0
        self._catalogue_synced = False
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        return self._num_workers > 0 and self._catalogue_synced

    def set_workers(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._changed.set()

    def set_catalogue_synced(self) -> None:
        """For good: a copy that falls behind still serves what it knows."""
        self._catalogue_synced = True
        self._changed.set()

    async def report(self, to: Callable[[bool], Awaitable[None]]) -> None:
        """Tell `to` at each change, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await to(self.ready)
