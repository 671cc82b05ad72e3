"""What operators ask of one store: its pins and imports."""

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc.aio

from lorry.client.adapter import Adapter
from lorry.client.generation import adapter_name
from lorry.client.retry import RetryPolicy, retrying
from lorry.v1 import store_admin_service_pb2 as pb
from lorry.v1.store_admin_service_pb2_grpc import StoreAdminServiceStub

Response = TypeVar("Response")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """An adapter whose page images a store keeps in memory."""

    name: str
    version: str  # in hex; empty if there is no such adapter now
    images: int  # in memory, one for each layout
    image_bytes: int

    @classmethod
    def from_proto(cls, message: pb.Pin) -> "Pin":
        return cls(
            name=message.name,
            version=message.version.hex(),
            images=message.images,
            image_bytes=message.image_bytes,
        )


class ImportState(enum.Enum):
    WAITING = "waiting"
    IMPORTED = "imported"
    FAILED = "failed"


STATES = {
    ImportState.WAITING: pb.Import.STATE_WAITING,
    ImportState.IMPORTED: pb.Import.STATE_IMPORTED,
    ImportState.FAILED: pb.Import.STATE_FAILED,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Import:
    """A directory that is an adapter's, or should be."""

    path: str
    state: ImportState
    error: str
    version: str  # in hex

    @classmethod
    def from_proto(cls, message: pb.Import) -> "Import":
        return cls(
            path=message.path,
            state={proto: state for state, proto in STATES.items()}[message.state],
            error=message.error,
            version=message.version.hex(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HubImport:
    """What an import from the hub has become."""

    adapter: Adapter
    commit: str
    unchanged: bool  # the name has had these very files before


class StoreAdmin:
    """For callers with the role admin. All calls may be repeated, so all are retried."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float, retry: RetryPolicy) -> None:
        self._stub = StoreAdminServiceStub(channel)
        self._timeout_s = timeout_s
        self._retry = retry

    async def pin(self, name: str) -> Pin:
        """Keep an adapter's images in the store's memory; returns once they are there."""
        response = await self._call(
            self._stub.PinImage, pb.PinImageRequest(name=adapter_name(name))
        )
        return Pin.from_proto(response.pin)

    async def unpin(self, name: str) -> None:
        await self._call(self._stub.UnpinImage, pb.UnpinImageRequest(name=adapter_name(name)))

    async def pins(self) -> Sequence[Pin]:
        response = await self._call(self._stub.ListPins, pb.ListPinsRequest())
        return [Pin.from_proto(message) for message in response.pins]

    async def imports(self, *, only: ImportState | None = None) -> AsyncIterator[Import]:
        """The directories of the watched import directory, by path; `only` those in one state."""
        request = pb.ListImportsRequest(
            page_size=1000, state=pb.Import.STATE_UNSPECIFIED if only is None else STATES[only]
        )
        while True:
            response = await self._call(self._stub.ListImports, request)
            for message in response.imports:
                yield Import.from_proto(message)
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def import_from_hub(
        self, repository: str, revision: str, name: str, *, replace: bool = False
    ) -> HubImport:
        """Have the store download an adapter and publish it; the call's timeout bounds all of it.

        What is unchanged is not published again, so a retry after a lost answer is harmless.
        """
        request = pb.ImportFromHubRequest(
            repository=repository, revision=revision, name=adapter_name(name), replace=replace
        )
        response = await self._call(self._stub.ImportFromHub, request)
        return HubImport(
            adapter=Adapter.from_proto(response.adapter),
            commit=response.commit,
            unchanged=response.unchanged,
        )

    async def _call(self, method: Callable[..., Awaitable[Response]], request: object) -> Response:
        return await retrying(
            lambda _, remaining_s: method(request, timeout=remaining_s),
            policy=self._retry,
            timeout_s=self._timeout_s,
        )
