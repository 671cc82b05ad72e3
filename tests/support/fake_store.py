"""A real CatalogueService and GetAdapter over a dict, with the failures that a test asks for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from lorry.rpc.errors import AdapterNotFound, RevisionCompacted, StoreUnavailable
from lorry.rpc.identity import Authenticator
from lorry.rpc.server import serving
from lorry.v1 import adapter_service_pb2 as adapter_pb
from lorry.v1 import catalogue_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import (
    AdapterServiceServicer,
    add_AdapterServiceServicer_to_server,
)
from lorry.v1.catalogue_service_pb2_grpc import (
    CatalogueServiceServicer,
    add_CatalogueServiceServicer_to_server,
)

SERVICES = ["lorry.v1.CatalogueService", "lorry.v1.AdapterService"]


class FakeStore:
    def __init__(self, store_id: str = "store-1") -> None:
        self.store_id = store_id
        self.adapters: dict[str, adapter_pb.Adapter] = {}
        self.events: list[tuple[int, pb.AdapterEvent]] = []
        self.revision = 1
        self.oldest_revision = 0  # watches cannot continue from before it
        self.lagging = False  # changes do not reach the watchers
        self.failing = False  # GetAdapter answers UNAVAILABLE
        self.hanging = False  # GetAdapter does not answer
        self.refusing = False  # WatchCatalogue answers UNAVAILABLE
        self.watches: list[pb.WatchCatalogueRequest] = []
        self.asked: list[str] = []
        self.port = 0
        self._changed = asyncio.Event()
        self._generation = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def publish(self, name: str, version: bytes, *, rank: int = 8) -> None:
        published = adapter_pb.AdapterVersion(digest=version, max_rank=rank)
        adapter = adapter_pb.Adapter(name=name, version=version, published=published)
        self.adapters[name] = adapter
        self._add(pb.AdapterEvent(type=pb.AdapterEvent.TYPE_UPSERTED, adapter=adapter))

    def delete(self, name: str) -> None:
        del self.adapters[name]
        gone = adapter_pb.Adapter(name=name)
        self._add(pb.AdapterEvent(type=pb.AdapterEvent.TYPE_DELETED, adapter=gone))

    def end_watches(self) -> None:
        self._generation += 1
        self._changed.set()

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator["FakeStore"]:
        def register(server: grpc.aio.Server) -> None:
            add_CatalogueServiceServicer_to_server(_Catalogue(self), server)
            adapters = _Adapters(self)  # type: ignore[abstract] # the rest stays UNIMPLEMENTED
            add_AdapterServiceServicer_to_server(adapters, server)

        async with serving(
            register,
            services=SERVICES,
            address=f"127.0.0.1:{port}",
            authenticator=Authenticator(),
            grace_s=0,
        ) as server:
            self.port = server.port
            yield self

    async def watch(self, request: pb.WatchCatalogueRequest) -> AsyncIterator[Any]:
        self.watches.append(request)
        generation, sent = self._generation, request.start_revision
        if self.refusing:
            raise StoreUnavailable("the store is told to refuse watches")
        if sent and (sent < self.oldest_revision or request.store_id != self.store_id):
            raise RevisionCompacted("list again")
        if not sent:
            for adapter in list(self.adapters.values()):
                event = pb.AdapterEvent(type=pb.AdapterEvent.TYPE_UPSERTED, adapter=adapter)
                yield self._message(1, [event], complete=False)
            sent = self.revision
        yield self._message(sent, [], complete=True)
        while generation == self._generation:
            fresh = [] if self.lagging else [(r, e) for r, e in self.events if r > sent]
            for sent, event in fresh:
                yield self._message(sent, [event], complete=True)
            self._changed.clear()
            await self._changed.wait()

    def _message(
        self, revision: int, events: list[pb.AdapterEvent], *, complete: bool
    ) -> pb.WatchCatalogueResponse:
        return pb.WatchCatalogueResponse(
            store_id=self.store_id, revision=revision, events=events, snapshot_complete=complete
        )

    def _add(self, event: pb.AdapterEvent) -> None:
        self.revision += 1
        self.events.append((self.revision, event))
        self._changed.set()


class _Catalogue(CatalogueServiceServicer):
    def __init__(self, store: FakeStore) -> None:
        self._store = store

    async def WatchCatalogue(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for response in self._store.watch(request):
            yield response


class _Adapters(AdapterServiceServicer):
    def __init__(self, store: FakeStore) -> None:
        self._store = store

    async def GetAdapter(self, request: Any, context: Any) -> adapter_pb.GetAdapterResponse:
        self._store.asked.append(request.name)
        if self._store.hanging:
            await asyncio.sleep(60)
        if self._store.failing:
            raise StoreUnavailable("the store is told to fail")
        adapter = self._store.adapters.get(request.name)
        if adapter is None:
            raise AdapterNotFound(f"adapter {request.name} is not registered")
        return adapter_pb.GetAdapterResponse(adapter=adapter)
