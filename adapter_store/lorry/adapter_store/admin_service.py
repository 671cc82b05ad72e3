"""The operators' service of one store: its methods translate."""

from typing import Any

import grpc.aio

from lorry.adapter_store.warmer import Warmer
from lorry.rpc.identity import current_caller
from lorry.rpc.names import AdapterName
from lorry.v1 import store_admin_service_pb2 as pb
from lorry.v1.store_admin_service_pb2_grpc import StoreAdminServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]


class StoreAdminServicer(StoreAdminServiceServicer):
    def __init__(self, warmer: Warmer) -> None:
        self._warmer = warmer

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

    def _pin(self, name: AdapterName) -> pb.Pin:
        version = self._warmer.pins.version(name)
        images = [] if version is None else self._warmer.images.resident(version)
        return pb.Pin(
            name=str(name), version=version or b"", images=len(images), image_bytes=sum(images)
        )


def _name(text: str) -> AdapterName:
    return AdapterName.parse(text, tenant=current_caller().tenant, field="name")
