"""Fetches page images from the adapter store for the engine and holds them while it needs them.

One task for each version: it fetches, tells the engine, and keeps what it got; cancelling it gives
everything back. A file in shared memory is the store's, and the open call is its lease. Chunks go
to a file of this worker's own, and their call ends.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio

from lorry.rpc.backoff import Backoff
from lorry.rpc.call_counts import Outcome
from lorry.rpc.errors import (
    AdapterIncompatible,
    AdapterNotFound,
    DigestMismatch,
    LayoutUnsupported,
    LorryError,
    StoreFull,
    StoreUnavailable,
    VersionNotFound,
)
from lorry.worker.failures import to_failure
from lorry.worker.image_source import Call, CopiesFull, Held, ImageSource, read_message
from lorry.worker.messages import Command, ImageFailed, ImageReady, ReclaimImage
from lorry.worker.statistics import fetches

# What the router and the client may be told as it is; anything else is the store's own trouble.
PASSED_ON = (AdapterIncompatible, AdapterNotFound, VersionNotFound, StoreFull, DigestMismatch)
Send = Callable[[Command], None]

log = logging.getLogger(__name__)


class ImageFetcher:
    """Answers the engine's FetchImage and ReleaseImage."""

    def __init__(
        self,
        source: ImageSource,
        channel: grpc.aio.Channel,
        send: Send,
        *,
        max_fetches: int,
        timeout_s: float,
        copied_bytes: int,
    ) -> None:
        """`copied_bytes` is how much memory images may take that are not the store's files."""
        self._source = source
        self._channel = channel
        self._send = send
        self._timeout_s = timeout_s
        self.fetches = fetches()
        self.failures: Counter[Outcome] = Counter()
        self._slots = asyncio.Semaphore(max_fetches)
        self._tasks: dict[bytes, asyncio.Task[None]] = {}
        self._copied_bytes = copied_bytes
        self._copied: dict[bytes, int] = {}  # bytes by version, oldest first

    @property
    def num_held(self) -> int:
        """Images that are held or being fetched."""
        return len(self._tasks)

    @property
    def copied_bytes(self) -> int:
        """Memory that copies of images take."""
        return sum(self._copied.values())

    def fetch(self, version: bytes) -> None:
        """Answered by ImageReady or ImageFailed, unless released before."""
        if version not in self._tasks:
            self._tasks[version] = asyncio.create_task(self._hold(version))

    def release(self, version: bytes) -> None:
        """Give up the image or the fetch of it; unknown versions are ignored."""
        if task := self._tasks.pop(version, None):
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for version in list(self._tasks):
            self.release(version)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _hold(self, version: bytes) -> None:
        try:
            with contextlib.ExitStack() as owner:
                held = await self._timed_fetch(version, owner)
                self._send(held.image)
                if held.image.copied:
                    owner.callback(self._copied.pop, version)
                    self._reclaim_for(held.image)
                await self._keep(held)
        except Exception as error:
            if not isinstance(error, LorryError):
                log.exception("the page image %s cannot be fetched", version.hex())
                error = LorryError("the adapter's page image cannot be fetched")
            self.failures[Outcome.of(error)] += 1
            self._tasks.pop(version, None)
            self._send(ImageFailed(version, to_failure(error)))

    def _reclaim_for(self, image: ImageReady) -> None:
        """Ask for the oldest copies back if there is too much with the new one."""
        image_bytes = image.image_bytes * (1 + len(image.other_ranks))
        excess = self.copied_bytes + image_bytes - self._copied_bytes
        for version, num_bytes in self._copied.items():
            if excess <= 0:
                break
            excess -= num_bytes
            self._send(ReclaimImage(version))
        self._copied[image.version] = image_bytes

    def _reclaim_oldest(self, count: int) -> None:
        """Ask for copies back; some may be in use, so each time a fetch finds no room for more."""
        for version in itertools.islice(self._copied, count):
            self._send(ReclaimImage(version))

    async def _timed_fetch(self, version: bytes, owner: contextlib.ExitStack) -> Held:
        started_s = time.monotonic()
        held = await self._fetch(version, owner)
        source = "chunks" if held.image.copied else "shm"
        self.fetches.note(source, held.image.image_bytes, time.monotonic() - started_s)
        return held

    async def _fetch(self, version: bytes, owner: contextlib.ExitStack) -> Held:
        """Try until it works, cannot work, or takes too long."""
        last: LorryError = StoreUnavailable("the adapter store did not answer in time")
        backoff, times_full = Backoff(), 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                while True:
                    try:
                        return await self._attempt(version, owner)
                    except LorryError as error:
                        last = error
                        if not _may_pass(error):
                            break
                        if isinstance(error, CopiesFull):
                            times_full += 1
                            self._reclaim_oldest(times_full)
                    await backoff.wait()
        log.warning("page image %s: %s %s", version.hex(), last.code.name, last)
        raise _for_clients(last)

    async def _attempt(self, version: bytes, owner: contextlib.ExitStack) -> Held:
        async with self._slots:
            with contextlib.ExitStack() as attempt:
                held = await self._source.open(version, attempt)
                owner.push(attempt.pop_all())
        return held

    async def _pass_on(self, version: bytes, lease: Call) -> NoReturn:
        """Tell the engine each time the store wants its memory back; raises LorryError."""
        while True:
            await read_message(lease, "reclaim")
            self._send(ReclaimImage(version))

    async def _keep(self, held: Held) -> None:
        """Hold the image until the task is cancelled, and pass on that the store wants it back.

        If the lease is lost, the engine may go on with what it has mapped while there is no store;
        one that is back counts its memory anew.
        """
        version = held.image.version
        if held.leases:
            try:
                await first_error(self._pass_on(version, lease) for lease in held.leases)
            except LorryError as error:
                log.warning("the lease of page image %s is lost: %s", version.hex(), error)
            await self._channel.channel_ready()
            self._send(ReclaimImage(version))
        await asyncio.get_running_loop().create_future()  # until cancelled


async def first_error(reads: Iterable[Coroutine[Any, Any, NoReturn]]) -> None:
    """Raise what the first of them raises, and end the others."""
    tasks = [asyncio.create_task(read) for read in reads]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _may_pass(error: LorryError) -> bool:
    """Whether another attempt makes sense; a full store says so where room may come."""
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return error.retry_after_s is not None
    return error.code is grpc.StatusCode.UNAVAILABLE


def _for_clients(error: LorryError) -> LorryError:
    if isinstance(error, LayoutUnsupported):
        return AdapterIncompatible(f"the adapter store: {error}")
    if isinstance(error, PASSED_ON):
        return error
    return StoreUnavailable("the adapter store is not available")
