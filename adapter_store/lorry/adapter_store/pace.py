"""How fast uploads may come, so that fetches find the processor free."""

import asyncio
import math
import time
from collections.abc import Callable

FETCHES_GO_ON_S = 0.2  # after one, others are expected
BYTES_PER_S = 100 << 20  # of all uploads together, while fetches come


class Pace:
    """Gives chunks their turns: at once while nobody fetches, else evenly spaced."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fetched_s = self._next_turn_s = -math.inf

    def fetched(self) -> None:
        """Note a fetch."""
        self._fetched_s = self._clock()

    async def turn(self, num_bytes: int) -> None:
        """Wait until a chunk of `num_bytes` may be taken."""
        await asyncio.sleep(self.take_turn(num_bytes))

    def take_turn(self, num_bytes: int) -> float:
        """Seconds until the turn of a chunk, which later ones come after."""
        now_s = self._clock()
        if now_s - self._fetched_s > FETCHES_GO_ON_S:
            return 0.0
        turn_s = max(now_s, self._next_turn_s)
        self._next_turn_s = turn_s + num_bytes / BYTES_PER_S
        return turn_s - now_s
