"""`AdapterService`: what operators do, each within its tenant. Its methods translate."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio

from lorry.adapter_store import edits, listing, translation
from lorry.adapter_store.records import Adapter, Published
from lorry.adapter_store.store import Store
from lorry.rpc.boundary import REQUEST_S
from lorry.rpc.errors import DeadlineExpired, InvalidRequest
from lorry.rpc.identity import current_caller
from lorry.rpc.names import AdapterName, check_id, check_sha256
from lorry.rpc.weight_chunk import Chunk
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1 import adapter_service_pb2_grpc as adapter_grpc

MAX_PAGE_BYTES = 1 << 20
Context = grpc.aio.ServicerContext[Any, Any]


class AdapterServicer(adapter_grpc.AdapterServiceServicer):
    """On a store."""

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
        self, request_iterator: AsyncIterator[Chunk | pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        start = await read_start(request_iterator)
        published = await self._store.uploads.receive(
            start.upload_id,
            current_caller().tenant,
            start.offset,
            translation.only_chunks(request_iterator),
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


async def read_start(requests: AsyncIterator[Chunk | pb.UploadAdapterRequest]) -> pb.UploadStart:
    """The first message of an upload's stream; it comes as soon as any request has to."""
    try:
        async with asyncio.timeout(REQUEST_S):
            first = await anext(aiter(requests), None)
    except TimeoutError:
        raise DeadlineExpired(f"start did not come within {REQUEST_S:g} s") from None
    if not isinstance(first, pb.UploadAdapterRequest) or not first.HasField("start"):
        raise InvalidRequest.of("payload", "the first message must be start")
    return first.start


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
