"""The store's services but for the operators' of memory; their methods translate."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio

from lorry.adapter_store import edits, listing, translation
from lorry.adapter_store.admin_service import StoreAdminServicer
from lorry.adapter_store.chunks import read_chunks
from lorry.adapter_store.hub import Hub
from lorry.adapter_store.imports import Imports
from lorry.adapter_store.leases import Lease
from lorry.adapter_store.records import Adapter, Published
from lorry.adapter_store.store import Store
from lorry.rpc.base_model import BaseModel
from lorry.rpc.errors import Draining, InvalidRequest, SlowReader
from lorry.rpc.identity import current_caller
from lorry.rpc.layout import layout_from_proto
from lorry.rpc.names import AdapterName, check_id, check_sha256
from lorry.rpc.protocol import MAX_CHUNK_BYTES
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_data_service_pb2_grpc as data_grpc
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1 import adapter_service_pb2_grpc as adapter_grpc
from lorry.v1 import catalogue_service_pb2 as catalogue_pb
from lorry.v1 import catalogue_service_pb2_grpc as catalogue_grpc
from lorry.v1 import store_admin_service_pb2_grpc as admin_grpc

SERVICES = tuple(
    f"lorry.v1.{name}"
    for name in ("AdapterService", "CatalogueService", "AdapterDataService", "StoreAdminService")
)
MAX_PAGE_BYTES = 1 << 20
STALL_S = 30.0  # without taking a chunk, after which a reader has no lease any more
RECLAIM_GRACE_S = 20.0  # from Reclaim until the store ends the call itself
Context = grpc.aio.ServicerContext[Any, Any]


class AdapterServicer(adapter_grpc.AdapterServiceServicer):
    """For operators, each within its tenant."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.GetAdapterResponse:
        adapter = self._visible(visible_name(request.name))
        return pb.GetAdapterResponse(adapter=translation.adapter_to_proto(adapter))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        catalogue, caller = self._store.catalogue, current_caller()
        labels = listing.parse_filter(request.filter)
        scope = f"{caller.sees_all_tenants} {caller.tenant} {request.filter}"
        last = listing.read_token(request.page_token, scope)
        after = None if last is None else AdapterName.parse(last, tenant=caller.tenant)
        tenant = None if caller.sees_all_tenants else caller.tenant
        found = catalogue.after(after, tenant=tenant, labels=labels)
        page, more = take_page(found, listing.page_size(request.page_size))
        return pb.ListAdaptersResponse(
            adapters=page,
            next_page_token=listing.make_token(scope, page[-1].name) if more else "",
            revision=catalogue.revision,
            store_id=catalogue.store_id,
        )

    async def UpdateAdapter(
        self, request: pb.UpdateAdapterRequest, context: Context
    ) -> pb.UpdateAdapterResponse:
        name = self._visible(visible_name(request.adapter.name, field="adapter.name")).name
        if not request.adapter.etag:
            raise InvalidRequest.of("adapter.etag", "is required")
        new = translation.update_from_proto(request)
        adapter, revision = await self._store.update(name, request.adapter.etag, new)
        return pb.UpdateAdapterResponse(
            adapter=translation.adapter_to_proto(adapter), revision=revision
        )

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: Context
    ) -> pb.DeleteAdapterResponse:
        name, allow_missing = (
            AdapterName.parse(request.name, tenant=current_caller().tenant, field="name"),
            request.allow_missing,
        )
        if not is_visible(name):
            edits.delete(None, name, "", allow_missing=allow_missing)
            return pb.DeleteAdapterResponse(revision=self._store.catalogue.revision)
        revision = await self._store.delete(name, request.etag, allow_missing=allow_missing)
        return pb.DeleteAdapterResponse(revision=revision)

    async def ListAdapterVersions(
        self, request: pb.ListAdapterVersionsRequest, context: Context
    ) -> pb.ListAdapterVersionsResponse:
        adapter = self._visible(visible_name(request.name))
        size = listing.page_size(request.page_size)
        last = listing.read_token(request.page_token, str(adapter.name))
        digests = [version.digest.hex() for version in adapter.versions]
        start = digests.index(last) + 1 if last in digests else 0
        page = adapter.versions[start : start + size]
        more = start + size < len(digests)
        return pb.ListAdapterVersionsResponse(
            versions=[translation.version_to_proto(version) for version in page],
            next_page_token=listing.make_token(str(adapter.name), page[-1].digest.hex())
            if more
            else "",
        )

    async def CreateUpload(
        self, request: pb.CreateUploadRequest, context: Context
    ) -> pb.CreateUploadResponse:
        name = AdapterName(
            current_caller().tenant, check_id(request.adapter_id, field="adapter_id")
        )
        upload_id, upload = await self._store.begin_upload(
            name,
            config_json=request.config_json,
            weights_bytes=request.weights_bytes,
            weights_sha256=check_sha256(request.weights_sha256, field="weights_sha256"),
            labels=dict(request.labels),
            expected_etag=request.expected_etag,
        )
        return pb.CreateUploadResponse(
            upload_id=upload_id,
            expire_time=translation.timestamp(self._store.uploads.expire_time_ns(upload)),
        )

    async def GetUpload(
        self, request: pb.GetUploadRequest, context: Context
    ) -> pb.GetUploadResponse:
        tenant = current_caller().tenant
        uploads = self._store.uploads
        upload = await uploads.find(request.upload_id, tenant)
        if isinstance(upload, Published):
            return translation.published_upload_to_proto(upload)
        return pb.GetUploadResponse(
            received_bytes=upload.received_bytes,
            expire_time=translation.timestamp(uploads.expire_time_ns(upload)),
        )

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("payload") != "start":
            raise InvalidRequest.of("payload", "the first message must be start")
        published = await self._store.uploads.receive(
            first.start.upload_id,
            current_caller().tenant,
            first.start.offset,
            translation.chunks_from_proto(request_iterator),
        )
        return pb.UploadAdapterResponse(
            version=translation.version_to_proto(published.version),
            adapter=translation.adapter_to_proto(published.adapter),
        )

    def _visible(self, name: AdapterName) -> Adapter:
        adapter = self._store.catalogue.get(name)
        if adapter is None:
            raise edits.not_found(name)
        return adapter


class CatalogueServicer(catalogue_grpc.CatalogueServiceServicer):
    """For routers."""

    def __init__(self, store: Store) -> None:
        self._catalogue = store.catalogue

    async def WatchCatalogue(
        self, request: catalogue_pb.WatchCatalogueRequest, context: Context
    ) -> AsyncIterator[catalogue_pb.WatchCatalogueResponse]:
        async for update in self._catalogue.watch(request.store_id, request.start_revision):
            yield translation.watch_update_to_proto(update, self._catalogue.store_id)


class AdapterDataServicer(data_grpc.AdapterDataServiceServicer):
    """For workers."""

    def __init__(self, store: Store, base_model: BaseModel) -> None:
        self._store = store
        self._base_model = base_model

    async def FetchAdapter(
        self,
        request: data_pb.FetchAdapterRequest,
        context: Any,  # grpc's stubs let add_done_callback take no function
    ) -> AsyncIterator[data_pb.FetchAdapterResponse]:
        version = check_sha256(request.version, field="version")
        layout = layout_from_proto(request.layout, self._base_model)
        by_handle, chunk_bytes = self._by_handle(request), max_chunk_bytes(request)
        lease = await self._store.lease(version, layout)
        # A generator whose peer is gone may never resume, so the call itself ends the lease.
        context.add_done_callback(lambda _: lease.release())
        self._store.fetches.begun["shm" if by_handle else "chunks",] += 1
        header = translation.header_to_proto(lease.header, version, request.layout)
        yield data_pb.FetchAdapterResponse(header=header)
        send = (
            self._hand_out(lease)
            if by_handle
            else self._send_chunks(lease, request.offset, chunk_bytes)
        )
        async for response in send:
            yield response

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
    ) -> AsyncIterator[data_pb.FetchAdapterResponse]:
        """The image from `offset` on, then the end of the call."""
        image_bytes = lease.header.image_bytes
        if offset > image_bytes:
            raise InvalidRequest.of("offset", f"must be at most {image_bytes}, got {offset}")
        # While the reader takes nothing this generator rests in `yield`: a timer ends its lease.
        loop, patience = asyncio.get_running_loop(), None
        try:
            async for chunk in read_chunks(lease.path, range(offset, image_bytes, chunk_bytes)):
                if not lease.held:
                    raise SlowReader(f"the reader took nothing for {STALL_S:g} s")
                self._store.fetches.num_bytes["chunks",] += len(chunk.data)
                patience = loop.call_later(STALL_S, lease.release)
                yield translation.chunk_to_proto(chunk)
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


def visible_name(text: str, *, field: str = "name") -> AdapterName:
    """A name that the caller may see; another tenant's is not found, like an unknown one."""
    name = AdapterName.parse(text, tenant=current_caller().tenant, field=field)
    if not is_visible(name):
        raise edits.not_found(name)
    return name


def is_visible(name: AdapterName) -> bool:
    caller = current_caller()
    return caller.sees_all_tenants or caller.tenant == name.tenant


def take_page(adapters: Iterator[Adapter], size: int) -> tuple[list[pb.Adapter], bool]:
    """Up to `size` adapters that fit into a message, and whether there are more."""
    page: list[pb.Adapter] = []
    num_bytes = 0
    for adapter in adapters:
        if len(page) == size or num_bytes > MAX_PAGE_BYTES:
            return page, True
        page.append(translation.adapter_to_proto(adapter))
        num_bytes += page[-1].ByteSize()
    return page, False


def register(
    server: grpc.aio.Server, store: Store, base_model: BaseModel, *, imports: Imports, hub: Hub
) -> None:
    """Add the store's services to a server."""
    adapter_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(store), server)
    catalogue_grpc.add_CatalogueServiceServicer_to_server(CatalogueServicer(store), server)
    data_grpc.add_AdapterDataServiceServicer_to_server(
        AdapterDataServicer(store, base_model), server
    )
    admin_grpc.add_StoreAdminServiceServicer_to_server(
        StoreAdminServicer(store.warmer, imports, hub), server
    )
