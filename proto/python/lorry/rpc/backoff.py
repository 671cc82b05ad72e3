"""Waiting between attempts to reach a peer."""

import asyncio
import random

FIRST_S = 0.1
LONGEST_S = 2.0


class Backoff:
    """Each wait is up to twice as long as the last one, with jitter."""

    def __init__(self) -> None:
        self._next_s = FIRST_S

    def reset(self) -> None:
        """The peer answered."""
        self._next_s = FIRST_S

    async def wait(self) -> None:
        await asyncio.sleep(self._next_s * random.uniform(0.5, 1.0))
        self._next_s = min(2 * self._next_s, LONGEST_S)
