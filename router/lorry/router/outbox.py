"""Commands that wait to be written to a worker's stream."""

import asyncio
from typing import NamedTuple

from lorry.router.actions import Prefetch, Submit


class Commands(NamedTuple):
    submits: list[Submit]
    cancels: list[int]  # seqs
    prefetch: Prefetch | None


class Outbox:
    """Small by itself: Submits are bounded by the worker's limit, each request is cancelled once,
    and of Prefetches only the last one counts."""

    def __init__(self) -> None:
        self._submits: list[Submit] = []
        self._cancels: list[int] = []
        self._prefetch: Prefetch | None = None
        self._filled = asyncio.Event()

    def submit(self, submit: Submit) -> None:
        self._submits.append(submit)
        self._filled.set()

    def cancel(self, seq: int) -> None:
        self._cancels.append(seq)
        self._filled.set()

    def prefetch(self, prefetch: Prefetch) -> None:
        self._prefetch = prefetch
        self._filled.set()

    async def take(self) -> Commands:
        """Wait for commands and take all of them."""
        await self._filled.wait()
        self._filled.clear()
        taken = Commands(self._submits, self._cancels, self._prefetch)
        self._submits, self._cancels, self._prefetch = [], [], None
        return taken
