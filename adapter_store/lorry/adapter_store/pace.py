"""How fast uploads may come, so that fetches find the processors free."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable

FETCHES_GO_ON_S = 0.2  # after one, others are expected
SPACING = 10  # from one chunk to the next, in times of a chunk: uploads have a tenth of the time
MAX_CHUNK_S = 0.01  # more counts as this: uploads get ten chunks a second whatever hangs


class Pace:
    """Gives chunks their turns: at once while nobody fetches, else spaced by what they take.

    On busy processors a chunk takes longer, 7 ms and not 0.7, and so do the rests between chunks.
    With two processors, three quarters busy with fetches, the p99 of these beside an upload is 1.3
    times what it is alone, and 6 times if uploads never rest; 80 MiB take 3.5 s and not 1.6.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fetched_s = self._next_turn_s = -math.inf
        self._chunk_s = 0.0

    def fetched(self) -> None:
        """Note a fetch."""
        self._fetched_s = self._clock()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn of a chunk, which the block takes."""
        await asyncio.sleep(self.take_turn())
        begun_s = self._clock()
        try:
            yield
        finally:
            self.took(self._clock() - begun_s)

    def take_turn(self) -> float:
        """Seconds until the turn of a chunk, which later ones come after."""
        now_s = self._clock()
        if now_s - self._fetched_s > FETCHES_GO_ON_S:
            return 0.0
        turn_s = max(now_s, self._next_turn_s)
        self._next_turn_s = turn_s + SPACING * self._chunk_s
        return turn_s - now_s

    def took(self, chunk_s: float) -> None:
        """Note how long the last chunk, of any upload, has taken."""
        self._chunk_s = min(chunk_s, MAX_CHUNK_S)
