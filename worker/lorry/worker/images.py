"""Fetches page images from the adapter store for the engine and holds them while it needs them.

One task for each version: it fetches, tells the engine, and keeps what it got; cancelling it gives
everything back. A file in shared memory is the store's, and the open call is its lease. Chunks go
to a file of this worker's own, and their call ends.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import grpc
import grpc.aio
import msgspec
from crc32c import crc32c

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
from lorry.rpc.shared_directory import SharedDirectory
from lorry.rpc.shared_memory import SharedFileRefused, open_shared, shm_namespace_id
from lorry.rpc.status import from_rpc
from lorry.rpc.weight_chunk import Chunk, fetch_adapter
from lorry.v1 import adapter_data_service_pb2 as pb
from lorry.worker.failures import to_failure
from lorry.worker.image_header import ImageFormat, to_image
from lorry.worker.messages import Command, ImageFailed, ImageFile, ImageReady, ReclaimImage
from lorry.worker.statistics import fetches

# What the router and the client may be told as it is; anything else is the store's own trouble.
PASSED_ON = (AdapterIncompatible, AdapterNotFound, VersionNotFound, StoreFull, DigestMismatch)
Call = grpc.aio.UnaryStreamCall[Any, Any]
Send = Callable[[Command], None]

log = logging.getLogger(__name__)


class Held(NamedTuple):
    """A fetched image, one for each rank, and the calls that lease what is the store's."""

    image: ImageReady
    leases: tuple[Call, ...]


class ImageSource:
    """One attempt at a fetch: asks the store, checks everything it says."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        formats: Sequence[ImageFormat],
        *,
        shm_dir: Path,
        local: SharedDirectory,
    ) -> None:
        """`formats` are those of the tensor-parallel ranks, in their order."""
        self._fetch = fetch_adapter(channel)
        self._formats = formats
        self._shm_dir = shm_dir
        self._local = local

    async def open(self, version: bytes, owner: contextlib.ExitStack) -> Held:
        """Fetch an image; whatever it takes to keep it is left to `owner`. Raises LorryError."""
        first, *others = [await self._open_one(version, f, owner) for f in self._formats]
        files = [ImageFile(held.image.path, held.image.offset) for held in others]
        image = msgspec.structs.replace(first.image, other_ranks=files)
        return Held(image, sum((held.leases for held in others), first.leases))

    async def _open_one(
        self, version: bytes, image_format: ImageFormat, owner: contextlib.ExitStack
    ) -> Held:
        """One rank's."""
        try:
            return await self._open(version, image_format, owner, shared=True)
        except SharedFileRefused as error:
            log.warning("%s: %s; fetching it as chunks", version.hex(), error)
            return await self._open(version, image_format, owner, shared=False)

    async def _open(
        self,
        version: bytes,
        image_format: ImageFormat,
        owner: contextlib.ExitStack,
        *,
        shared: bool,
    ) -> Held:
        call: Call = self._fetch(self._request(version, image_format, shared))
        owner.callback(call.cancel)
        header = await _read(call, "header")
        image_format.check(header.header, version)
        first = await _read(call, "shm", "chunk")
        if isinstance(first, Chunk):
            return Held(await self._chunks(header.header, first, call, owner), ())
        return Held(self._shared(header.header, first.shm), (call,))

    def _request(
        self, version: bytes, image_format: ImageFormat, shared: bool
    ) -> pb.FetchAdapterRequest:
        transports = [pb.TRANSPORT_SHM] if shared else []
        return pb.FetchAdapterRequest(
            version=version,
            layout=image_format.to_proto(),
            accepted_transports=[*transports, pb.TRANSPORT_CHUNKS],
            shm_namespace_id=shm_namespace_id(self._shm_dir) if shared else "",
        )

    def _shared(self, header: pb.ImageHeader, handle: pb.ShmHandle) -> ImageReady:
        if handle.bytes != header.image_bytes:
            raise SharedFileRefused(f"{handle.bytes} bytes for an image of {header.image_bytes}")
        # The engine maps it again; here it is only looked at.
        open_shared(self._shm_dir, handle.name, handle.offset + handle.bytes).close()
        return to_image(header, str(self._shm_dir / handle.name), handle.offset)

    async def _chunks(
        self,
        header: pb.ImageHeader,
        chunk: Chunk,
        call: Call,
        owner: contextlib.ExitStack,
    ) -> ImageReady:
        """Copy the chunks to a local file: 1 MiB takes less than the way to a thread and back."""
        path = self._local.create(header.image_bytes)
        owner.callback(self._local.remove, path)
        received, image_crc = 0, 0
        with path.open("r+b") as file:
            while True:
                if chunk.offset != received or received + len(chunk.data) > header.image_bytes:
                    raise DigestMismatch(f"a chunk of the page image is not at {received}")
                if crc32c(chunk.data) != chunk.crc32c:
                    raise DigestMismatch(f"the page image's chunk at {received} has another CRC")
                file.write(chunk.data)
                image_crc = crc32c(chunk.data, image_crc)
                received += len(chunk.data)
                if received == header.image_bytes:
                    break
                chunk = await _read(call, "chunk")
        if image_crc != header.image_crc32c:
            raise DigestMismatch("the page image has another CRC than its header says")
        return to_image(header, str(path), 0, copied=True)


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
                async with self._slots:
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

    async def _timed_fetch(self, version: bytes, owner: contextlib.ExitStack) -> Held:
        started_s = time.monotonic()
        held = await self._fetch(version, owner)
        source = "chunks" if held.image.copied else "shm"
        self.fetches.note(source, held.image.image_bytes, time.monotonic() - started_s)
        return held

    async def _fetch(self, version: bytes, owner: contextlib.ExitStack) -> Held:
        """Try until it works, cannot work, or takes too long."""
        last: LorryError = StoreUnavailable("the adapter store did not answer in time")
        backoff = Backoff()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                while True:
                    try:
                        return await self._attempt(version, owner)
                    except LorryError as error:
                        last = error
                        if not _may_pass(error):
                            break
                    await backoff.wait()
        log.warning("page image %s: %s %s", version.hex(), last.code.name, last)
        raise _for_clients(last)

    async def _attempt(self, version: bytes, owner: contextlib.ExitStack) -> Held:
        with contextlib.ExitStack() as attempt:
            held = await self._source.open(version, attempt)
            owner.push(attempt.pop_all())
        return held

    async def _pass_on(self, version: bytes, lease: Call) -> NoReturn:
        """Tell the engine each time the store wants its memory back; raises LorryError."""
        while True:
            await _read(lease, "reclaim")
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


async def _read(call: Call, *expected: str) -> Any:
    """The next message, one of the expected, a chunk as `Chunk`.

    Raises the LorryError that the call ended with.
    """
    try:
        message: Any = await call.read()
    except grpc.RpcError as error:
        raise from_rpc(error) from error
    if message is grpc.aio.EOF:
        raise StoreUnavailable("the adapter store ended the fetch early")
    payload = "chunk" if isinstance(message, Chunk) else message.WhichOneof("payload")
    if payload not in expected:
        raise StoreUnavailable(f"the adapter store sent {payload}, not {' or '.join(expected)}")
    return message


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
