"""The store's services, each on a server of gRPC's."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from lorry.adapter_store import translation
from lorry.adapter_store.adapter_service import AdapterServicer
from lorry.adapter_store.admin_service import StoreAdminServicer
from lorry.adapter_store.data_service import AdapterDataServicer
from lorry.adapter_store.hub import Hub
from lorry.adapter_store.imports import Imports
from lorry.adapter_store.store import Store
from lorry.rpc.base_model import BaseModel
from lorry.rpc.weight_chunk import add_chunk_methods
from lorry.v1 import adapter_data_service_pb2_grpc as data_grpc
from lorry.v1 import adapter_service_pb2_grpc as adapter_grpc
from lorry.v1 import catalogue_service_pb2 as catalogue_pb
from lorry.v1 import catalogue_service_pb2_grpc as catalogue_grpc
from lorry.v1 import store_admin_service_pb2_grpc as admin_grpc

SERVICES = tuple(
    f"lorry.v1.{name}"
    for name in ("AdapterService", "CatalogueService", "AdapterDataService", "StoreAdminService")
)
Context = grpc.aio.ServicerContext[Any, Any]


class CatalogueServicer(catalogue_grpc.CatalogueServiceServicer):
    """For routers."""

    def __init__(self, store: Store) -> None:
        self._catalogue = store.catalogue

    async def WatchCatalogue(
        self, request: catalogue_pb.WatchCatalogueRequest, context: Context
    ) -> AsyncIterator[catalogue_pb.WatchCatalogueResponse]:
        async for update in self._catalogue.watch(request.store_id, request.start_revision):
            yield translation.watch_update_to_proto(update, self._catalogue.store_id)


def register(
    server: grpc.aio.Server, store: Store, base_model: BaseModel, *, imports: Imports, hub: Hub
) -> None:
    """Add the store's services to a server."""
    adapters, data = AdapterServicer(store), AdapterDataServicer(store, base_model)
    admin = StoreAdminServicer(store.warmer, imports, hub)
    adapter_grpc.add_AdapterServiceServicer_to_server(adapters, server)
    catalogue_grpc.add_CatalogueServiceServicer_to_server(CatalogueServicer(store), server)
    data_grpc.add_AdapterDataServiceServicer_to_server(data, server)
    admin_grpc.add_StoreAdminServiceServicer_to_server(admin, server)
    add_chunk_methods(server, upload=adapters.UploadAdapter, fetch=data.FetchAdapter)
