"""Waiting for what another process or task does."""

import asyncio
import contextlib
from collections.abc import Callable


async def until(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    """Return once `condition` holds; the bound only guards against hanging."""
    async with asyncio.timeout(timeout_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether `event` is set by then; returns as soon as it is."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()
