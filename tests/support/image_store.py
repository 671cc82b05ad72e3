"""A real AdapterDataService over images that it builds from adapters in memory."""

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crc32c import crc32c

from lorry.adapter_store.image import ImageHeader
from lorry.rpc.base_model import BaseModel
from lorry.rpc.errors import VersionNotFound
from lorry.rpc.identity import Authenticator
from lorry.rpc.layout import layout_from_proto
from lorry.rpc.server import serving
from lorry.rpc.shared_memory import shm_namespace_id
from lorry.v1 import adapter_data_service_pb2 as pb
from lorry.v1 import common_pb2
from lorry.v1.adapter_data_service_pb2_grpc import (
    AdapterDataServiceServicer,
    add_AdapterDataServiceServicer_to_server,
)
from tests.support.adapters import Tensors, build_image

CHUNK_BYTES = 4096


class ImageStore(AdapterDataServiceServicer):
    """Raises `failures`, one for each fetch, before fetches succeed; `tamper` spoils messages."""

    def __init__(self, base_model: BaseModel, shm_dir: Path) -> None:
        self.shm_dir = shm_dir
        self.failures: Iterator[Exception] = iter(())
        self.tamper: Callable[[pb.FetchAdapterResponse], None] = lambda message: None
        self.gate = asyncio.Event()  # fetches wait for it
        self.gate.set()
        self.fetches: list[bytes] = []
        self.open_fetches = 0
        self.most_open_fetches = 0
        self.leases: Counter[bytes] = Counter()
        self.metadata: dict[str, Any] = {}
        self.images: dict[bytes, bytes] = {}  # as last served
        self._base_model = base_model
        self._adapters: dict[bytes, tuple[Mapping[str, Any], Tensors]] = {}
        self._reclaims: dict[bytes, asyncio.Event] = {}
        self._end_leases = asyncio.Event()

    def add(self, config: Mapping[str, Any], tensors: Tensors) -> bytes:
        """Register an adapter; returns its version."""
        version = hashlib.sha256(b"%d" % len(self._adapters)).digest()
        self._adapters[version] = config, tensors
        return version

    def reclaim(self, version: bytes) -> None:
        """Ask for the memory of a leased image."""
        self._reclaims[version].set()

    def end_leases(self) -> None:
        """End every call that is open as a lease."""
        self._end_leases.set()

    async def FetchAdapter(
        self, request: pb.FetchAdapterRequest, context: Any
    ) -> AsyncIterator[pb.FetchAdapterResponse]:
        self.metadata = dict(context.invocation_metadata())
        self.fetches.append(request.version)
        self.open_fetches += 1
        self.most_open_fetches = max(self.most_open_fetches, self.open_fetches)
        try:
            await self.gate.wait()
            for failure in self.failures:
                raise failure
            header, image = self._build(request)
        finally:
            self.open_fetches -= 1
        messages = self._messages(request, header, image)
        for message in messages:
            self.tamper(message)
            yield message
            if message.HasField("shm"):
                async for reclaim in self._lease(request.version, context):
                    yield reclaim

    def _build(self, request: pb.FetchAdapterRequest) -> tuple[ImageHeader, bytes]:
        if request.version not in self._adapters:
            raise VersionNotFound(f"no version {request.version.hex()}")
        layout = layout_from_proto(request.layout, self._base_model)
        header, image = build_image(*self._adapters[request.version], layout)
        self.images[request.version] = bytes(image)
        return header, bytes(image)

    def _messages(
        self, request: pb.FetchAdapterRequest, header: ImageHeader, image: bytes
    ) -> Iterator[pb.FetchAdapterResponse]:
        yield pb.FetchAdapterResponse(header=_header(request, header))
        same_host = request.shm_namespace_id == shm_namespace_id(self.shm_dir) != ""
        if same_host and pb.TRANSPORT_SHM in request.accepted_transports:
            name = request.version.hex()
            (self.shm_dir / name).write_bytes(image)
            handle = pb.ShmHandle(name=name, offset=0, bytes=len(image))
            yield pb.FetchAdapterResponse(shm=handle)
            return
        for offset in range(0, len(image), CHUNK_BYTES):
            data = image[offset : offset + CHUNK_BYTES]
            chunk = common_pb2.WeightChunk(offset=offset, data=data, crc32c=crc32c(data))
            yield pb.FetchAdapterResponse(chunk=chunk)

    async def _lease(self, version: bytes, context: Any) -> AsyncIterator[pb.FetchAdapterResponse]:
        """Hold until the reader cancels; the file goes with the last lease."""
        self.leases[version] += 1
        reclaimed = self._reclaims[version] = asyncio.Event()
        context.add_done_callback(lambda _: self._end_lease(version))
        waits = [asyncio.create_task(e.wait()) for e in (reclaimed, self._end_leases)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if reclaimed.is_set():
                yield pb.FetchAdapterResponse(reclaim=pb.Reclaim())
                await waits[1]
        finally:
            for wait in waits:
                wait.cancel()

    def _end_lease(self, version: bytes) -> None:
        self.leases[version] -= 1
        if not self.leases[version]:
            (self.shm_dir / version.hex()).unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def serving_images(store: ImageStore, port: int = 0) -> AsyncIterator[str]:
    """The address of a server of the store's images."""
    async with serving(
        lambda server: add_AdapterDataServiceServicer_to_server(store, server),
        services=["lorry.v1.AdapterDataService"],
        address=f"127.0.0.1:{port}",
        authenticator=Authenticator(),
        grace_s=0,
    ) as server:
        yield f"127.0.0.1:{server.port}"


def _header(request: pb.FetchAdapterRequest, header: ImageHeader) -> pb.ImageHeader:
    modules = [
        pb.Module(
            name=module.name,
            row_offset=module.row_offset,
            b_row_offset=module.b_row_offset,
            scale_per_layer=module.scale_per_layer,
        )
        for module in header.modules
    ]
    return pb.ImageHeader(
        version=request.version,
        layout=request.layout,
        rank=header.rank,
        pages=header.pages,
        image_bytes=header.image_bytes,
        image_crc32c=header.crc32c,
        modules=modules,
    )
