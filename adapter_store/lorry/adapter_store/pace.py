"""How fast uploads may come, so that fetches find the processors free."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from weakref import WeakValueDictionary

FETCHES_GO_ON_S = 0.2  # after one, others are expected
SPACING = 10  # from one chunk to the next, in times of a chunk: uploads have a tenth of the time
MAX_CHUNK_S = 0.01  # more counts as this: uploads get ten chunks a second whatever hangs


class Pace:
    """Gives chunks their turns: at once while nobody fetches, else spaced by what they take.

    On busy processors a chunk takes longer, 7 ms and not 0.7, and so do the rests between chunks.
    With two processors, two thirds busy with fetches, the p99 of these beside an upload is 1.2 to
    2.0 times what it is alone, and was 6 when uploads never rested; 80 MiB take 2.9 s, else 0.4.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._fetched_s = self._next_turn_s = -math.inf
        self._chunk_s = 0.0  # what the last one has taken
        self._next = asyncio.Lock()  # whose holder has the next turn
        self._next_of: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def fetched(self) -> None:
        """Note a fetch."""
        self._fetched_s = self._clock()

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for the turn of a tenant's chunk, which the block takes; tenants take turns."""
        if self._fetches_come:
            next_of_tenant = self._next_of.setdefault(tenant, asyncio.Lock())
            async with next_of_tenant, self._next:
                await self._rest()
        begun_s = self._clock()
        try:
            yield
        finally:
            self._chunk_s = min(self._clock() - begun_s, MAX_CHUNK_S)

    async def _rest(self) -> None:
        wait_s = self._next_turn_s - self._clock()
        if wait_s > 0 and self._fetches_come:
            await self._sleep(wait_s)
        self._next_turn_s = self._clock() + SPACING * self._chunk_s

    @property
    def _fetches_come(self) -> bool:
        return self._clock() - self._fetched_s <= FETCHES_GO_ON_S
