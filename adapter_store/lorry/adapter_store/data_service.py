"""`AdapterDataService`: page images for workers, as handles of shared memory or as chunks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from lorry.adapter_store import translation
from lorry.adapter_store.chunks import chunk_message, mapped
from lorry.adapter_store.leases import Lease
from lorry.adapter_store.store import Store
from lorry.rpc.base_model import BaseModel
from lorry.rpc.errors import Draining, InvalidRequest, SlowReader
from lorry.rpc.layout import layout_from_proto
from lorry.rpc.names import check_sha256
from lorry.rpc.protocol import MAX_CHUNK_BYTES
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_data_service_pb2_grpc as data_grpc

STALL_S = 30.0  # without taking a chunk, after which a reader has no lease any more
RECLAIM_GRACE_S = 20.0  # from Reclaim until the store ends the call itself


class AdapterDataServicer(data_grpc.AdapterDataServiceServicer):
    """On a store of one base model."""

    def __init__(self, store: Store, base_model: BaseModel) -> None:
        self._store = store
        self._base_model = base_model

    async def FetchAdapter(
        self,
        request: data_pb.FetchAdapterRequest,
        context: Any,  # grpc's stubs let add_done_callback take no function
    ) -> AsyncIterator[Any]:
        """Yields responses, those with chunks as bytes."""
        version = check_sha256(request.version, field="version")
        layout = layout_from_proto(request.layout, self._base_model)
        by_handle, chunk_bytes = self._by_handle(request), max_chunk_bytes(request)
        lease = await self._store.lease(version, layout)
        # A generator whose peer is gone may never resume, so the call itself ends the lease.
        context.add_done_callback(lambda _: lease.release())
        self._store.fetches.begun["shm" if by_handle else "chunks",] += 1
        header = translation.header_to_proto(lease.header, version, request.layout)
        yield data_pb.FetchAdapterResponse(header=header)
        if by_handle:
            async for response in self._hand_out(lease):
                yield response
        else:
            async for message in self._send_chunks(lease, request.offset, chunk_bytes):
                yield message

    async def _hand_out(self, lease: Lease) -> AsyncIterator[data_pb.FetchAdapterResponse]:
        """The handle, and Reclaim when the store needs the memory; the reader ends the call."""
        self._store.fetches.num_bytes["shm",] += lease.header.image_bytes
        yield data_pb.FetchAdapterResponse(
            shm=data_pb.ShmHandle(name=lease.path.name, bytes=lease.header.image_bytes)
        )
        await lease.reclaimed.wait()
        yield data_pb.FetchAdapterResponse(reclaim=data_pb.Reclaim())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECLAIM_GRACE_S):
                await self._store.draining.wait()
                raise Draining("the store is shutting down", retry_after_s=1.0)
        raise SlowReader(f"the image was asked back {RECLAIM_GRACE_S:g} s ago")

    async def _send_chunks(
        self, lease: Lease, offset: int, chunk_bytes: int
    ) -> AsyncIterator[bytes]:
        """The image from `offset` on, as messages of chunks, then the end of the call."""
        image_bytes = lease.header.image_bytes
        if offset > image_bytes:
            raise InvalidRequest.of("offset", f"must be at most {image_bytes}, got {offset}")
        # While the reader takes nothing this generator rests in `yield`: a timer ends its lease.
        loop, patience = asyncio.get_running_loop(), None
        content, sent_bytes = mapped(lease), self._store.fetches.num_bytes
        try:
            for start in range(offset, image_bytes, chunk_bytes):
                if not lease.held:
                    raise SlowReader(f"the reader took nothing for {STALL_S:g} s")
                sent_bytes["chunks",] += min(chunk_bytes, image_bytes - start)
                patience = loop.call_later(STALL_S, lease.release)
                yield chunk_message(content, start, chunk_bytes)
                patience.cancel()
        finally:
            if patience is not None:
                patience.cancel()

    def _by_handle(self, request: data_pb.FetchAdapterRequest) -> bool:
        """Whether the first transport that the reader accepts and that works is a handle."""
        same_host = request.shm_namespace_id == self._store.shm_namespace_id != ""
        for transport in request.accepted_transports or [data_pb.TRANSPORT_CHUNKS]:
            if transport == data_pb.TRANSPORT_CHUNKS:
                return False
            if transport == data_pb.TRANSPORT_SHM and same_host and not request.offset:
                return True
        raise InvalidRequest.of(
            "accepted_transports", "only TRANSPORT_CHUNKS works between this reader and the store"
        )


def max_chunk_bytes(request: data_pb.FetchAdapterRequest) -> int:
    if not request.HasField("max_chunk_bytes"):
        return MAX_CHUNK_BYTES
    if not 0 < request.max_chunk_bytes <= MAX_CHUNK_BYTES:
        raise InvalidRequest.of(
            "max_chunk_bytes", f"must be in [1, {MAX_CHUNK_BYTES}], got {request.max_chunk_bytes}"
        )
    return request.max_chunk_bytes
