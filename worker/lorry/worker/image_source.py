"""One fetch of a page image from the adapter store, with all that it says checked."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import msgspec
from crc32c import crc32c

from lorry.rpc.errors import DigestMismatch, StoreFull, StoreUnavailable
from lorry.rpc.shared_directory import SharedDirectory
from lorry.rpc.shared_memory import SharedFileRefused, open_shared, shm_namespace_id
from lorry.rpc.status import from_rpc
from lorry.rpc.weight_chunk import Chunk, fetch_adapter
from lorry.v1 import adapter_data_service_pb2 as pb
from lorry.worker.image_header import ImageFormat, to_image
from lorry.worker.messages import ImageFile, ImageReady

Call = grpc.aio.UnaryStreamCall[Any, Any]

log = logging.getLogger(__name__)


class CopiesFull(StoreFull):
    """It is the worker's own memory for copies of images that has no room."""


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
        header = await read_message(call, "header")
        image_format.check(header.header, version)
        first = await read_message(call, "shm", "chunk")
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
        open_shared(self._shm_dir, handle.name, handle.offset + handle.bytes).release()
        return to_image(header, str(self._shm_dir / handle.name), handle.offset)

    async def _chunks(
        self,
        header: pb.ImageHeader,
        chunk: Chunk,
        call: Call,
        owner: contextlib.ExitStack,
    ) -> ImageReady:
        """Copy the chunks to a local file: 1 MiB takes less than the way to a thread and back."""
        path = await self._create(header.image_bytes)
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
                chunk = await read_message(call, "chunk")
        if image_crc != header.image_crc32c:
            raise DigestMismatch("the page image has another CRC than its header says")
        return to_image(header, str(path), 0, copied=True)

    async def _create(self, num_bytes: int) -> Path:
        """A file for a copy, whose memory a thread reserves: that takes up to a second."""
        creating = asyncio.create_task(asyncio.to_thread(self._local.create, num_bytes))
        try:
            return await asyncio.shield(creating)
        except StoreFull as error:
            raise CopiesFull(str(error), retry_after_s=error.retry_after_s) from error
        except asyncio.CancelledError:
            creating.add_done_callback(self._discard)
            raise

    def _discard(self, created: asyncio.Task[Path]) -> None:
        if not created.cancelled() and created.exception() is None:
            self._local.remove(created.result())


async def read_message(call: Call, *expected: str) -> Any:
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
