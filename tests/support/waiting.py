"""Waiting for what another process or task does."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    """Return once `condition` holds; the bound only guards against hanging."""
    async with asyncio.timeout(timeout_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)
