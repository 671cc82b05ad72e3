"""The operators' service of one store: its methods translate."""

from typing import Any

import grpc.aio

from lorry.adapter_store import listing, translation
from lorry.adapter_store.hub import Hub
from lorry.adapter_store.imports import Import, Imports, ImportState
from lorry.adapter_store.warmer import Warmer
from lorry.rpc.identity import current_caller
from lorry.rpc.names import AdapterName
from lorry.v1 import store_admin_service_pb2 as pb
from lorry.v1.store_admin_service_pb2_grpc import StoreAdminServiceServicer

STATES = {
    ImportState.WAITING: pb.Import.STATE_WAITING,
    ImportState.IMPORTED: pb.Import.STATE_IMPORTED,
    ImportState.FAILED: pb.Import.STATE_FAILED,
}
MAX_PATH_CHARS, MAX_ERROR_CHARS = 300, 500  # a page of a thousand stays below 2 MiB
Context = grpc.aio.ServicerContext[Any, Any]


class StoreAdminServicer(StoreAdminServiceServicer):
    def __init__(self, warmer: Warmer, imports: Imports, hub: Hub) -> None:
        self._warmer, self._imports, self._hub = warmer, imports, hub

    async def PinImage(self, request: pb.PinImageRequest, context: Context) -> pb.PinImageResponse:
        name = _name(request.name)
        await self._warmer.pin(name)
        return pb.PinImageResponse(pin=self._pin(name))

    async def UnpinImage(
        self, request: pb.UnpinImageRequest, context: Context
    ) -> pb.UnpinImageResponse:
        await self._warmer.unpin(_name(request.name))
        return pb.UnpinImageResponse()

    async def ListPins(self, request: pb.ListPinsRequest, context: Context) -> pb.ListPinsResponse:
        return pb.ListPinsResponse(pins=[self._pin(name) for name in self._warmer.pins])

    async def ListImports(
        self, request: pb.ListImportsRequest, context: Context
    ) -> pb.ListImportsResponse:
        size, scope = listing.page_size(request.page_size), f"imports {request.state}"
        last = listing.read_token(request.page_token, scope) or ""
        found = [
            each
            for each in self._imports.all
            if each.found.path > last and request.state in (0, STATES[each.state])
        ]
        page, more = found[:size], len(found) > size
        return pb.ListImportsResponse(
            imports=[_import_to_proto(each) for each in page],
            next_page_token=listing.make_token(scope, page[-1].found.path) if more else "",
        )

    async def ImportFromHub(
        self, request: pb.ImportFromHubRequest, context: Context
    ) -> pb.ImportFromHubResponse:
        brought = await self._hub.bring(
            request.repository, request.revision, _name(request.name), replace=request.replace
        )
        return pb.ImportFromHubResponse(
            adapter=translation.adapter_to_proto(brought.ingested.adapter),
            commit=brought.commit,
            unchanged=brought.ingested.unchanged,
        )

    def _pin(self, name: AdapterName) -> pb.Pin:
        version = self._warmer.pins.version(name)
        images = [] if version is None else self._warmer.images.resident(version)
        return pb.Pin(
            name=str(name), version=version or b"", images=len(images), image_bytes=sum(images)
        )


def _import_to_proto(each: Import) -> pb.Import:
    return pb.Import(
        path=each.found.path[:MAX_PATH_CHARS],
        state=STATES[each.state],
        error=each.error[:MAX_ERROR_CHARS],
        version=each.version,
    )


def _name(text: str) -> AdapterName:
    return AdapterName.parse(text, tenant=current_caller().tenant, field="name")
