"""A real adapter store on port 0, in this process, and what its clients do."""

import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from crc32c import crc32c
from safetensors.numpy import save_file

from lorry.adapter_store.backend import Backend
from lorry.adapter_store.file_backend import FileBackend
from lorry.adapter_store.hub import Hub
from lorry.adapter_store.imports import Imports, importing
from lorry.adapter_store.limits import Limits
from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.backend import RedisBackend
from lorry.adapter_store.service import SERVICES, register
from lorry.adapter_store.store import Settings, Store, opened
from lorry.kernels.page_layout import Dtype, ModelGeometry, PageLayout
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.channel import bearer
from lorry.rpc.identity import Authenticator, Caller
from lorry.rpc.layout import layout_to_proto
from lorry.rpc.server import serving
from lorry.rpc.status import from_rpc
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1 import common_pb2
from lorry.v1.adapter_data_service_pb2_grpc import AdapterDataServiceStub
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from lorry.v1.catalogue_service_pb2_grpc import CatalogueServiceStub
from lorry.v1.store_admin_service_pb2_grpc import StoreAdminServiceStub
from tests.support.adapters import TINY

CHUNK_BYTES = 16 << 10
UNLIMITED = 1 << 30


def write_base_model(directory: Path, geometry: ModelGeometry = TINY) -> Path:
    """A model directory as far as a store reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.intermediate,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "max_position_embeddings": 1024,
        "vocab_size": 320,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": np.ones(4, np.float32)}, directory / "model.safetensors")
    return directory


@dataclass
class Client:
    """The three services as one caller sees them."""

    channel: grpc.aio.Channel
    base_model: BaseModel
    token: str | None = None

    def __post_init__(self) -> None:
        self.adapters = AdapterServiceStub(self.channel)
        self.catalogue = CatalogueServiceStub(self.channel)
        self.data = AdapterDataServiceStub(self.channel)
        self.admin = StoreAdminServiceStub(self.channel)
        self.metadata = bearer(self.token)

    async def call(self, method: Any, request: Any) -> Any:
        """A unary call; raises the store's own error."""
        try:
            return await method(request, metadata=self.metadata, timeout=60)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error

    async def begin(
        self,
        adapter_id: str,
        config: Mapping[str, Any],
        weights: bytes,
        *,
        etag: str = "",
        labels: Mapping[str, str] | None = None,
        sha256: bytes | None = None,
        num_bytes: int | None = None,
    ) -> str:
        """Create an upload and return its id."""
        request = pb.CreateUploadRequest(
            adapter_id=adapter_id,
            config_json=json.dumps(config),
            weights_bytes=len(weights) if num_bytes is None else num_bytes,
            weights_sha256=hashlib.sha256(weights).digest() if sha256 is None else sha256,
            labels=labels,
            expected_etag=etag,
        )
        upload_id: str = (await self.call(self.adapters.CreateUpload, request)).upload_id
        return upload_id

    async def send(self, upload_id: str, weights: bytes, *, start: int = 0) -> Any:
        """Send everything from `start` on; returns the answer."""
        requests = list(upload_requests(upload_id, weights, start=start))
        return await self.call(self.adapters.UploadAdapter, iter(requests))

    async def upload(self, upload_id: str) -> pb.GetUploadResponse:
        request = pb.GetUploadRequest(upload_id=upload_id)
        response: pb.GetUploadResponse = await self.call(self.adapters.GetUpload, request)
        return response

    async def push(
        self, adapter_id: str, config: Mapping[str, Any], weights: bytes, **options: Any
    ) -> pb.Adapter:
        """Upload and publish."""
        upload_id = await self.begin(adapter_id, config, weights, **options)
        adapter: pb.Adapter = (await self.send(upload_id, weights)).adapter
        return adapter

    async def get(self, name: str) -> pb.Adapter:
        response = await self.call(self.adapters.GetAdapter, pb.GetAdapterRequest(name=name))
        adapter: pb.Adapter = response.adapter
        return adapter

    def fetch(self, version: bytes, **options: Any) -> Any:
        """An open FetchAdapter call."""
        layout = options.pop("layout", PageLayout(geometry=TINY, dtype=Dtype.FP32))
        if isinstance(layout, PageLayout):
            layout = layout_to_proto(layout, self.base_model.digest)
        request = data_pb.FetchAdapterRequest(version=version, layout=layout, **options)
        return self.data.FetchAdapter(request, metadata=self.metadata)


@dataclass
class RunningStore:
    store: Store
    client: Client
    shm_dir: Path
    backend_dir: Path
    port: int

    @contextlib.asynccontextmanager
    async def client_with(self, token: str) -> AsyncIterator[Client]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            yield Client(channel, self.client.base_model, token)


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """What a store may take from a hub."""

    allow: tuple[str, ...] = ()
    commits_only: bool = False
    timeout_s: float = 60.0


@contextlib.asynccontextmanager
async def running_store(
    directory: Path,
    *,
    ram_bytes: int = UNLIMITED,
    limits: Limits | None = None,
    dtype: Dtype = Dtype.FP32,
    tokens: Mapping[bytes, Caller] | None = None,
    now_ns: Callable[[], int] = time.time_ns,
    clock: Callable[[], float] = time.monotonic,
    shm_dir: Path | None = None,
    model: Path | None = None,
    import_dir: Path | None = None,
    import_delete: bool = False,
    hub: HubOptions | None = None,
    redis_url: str | None = None,
) -> AsyncIterator[RunningStore]:
    """A store that keeps its adapters in `directory` or a Redis, and a client of this machine."""
    base_model = read_base_model(model or write_base_model(directory / "model"))
    shm_dir, backend_dir = shm_dir or directory / "shm", directory / "adapters"
    settings = Settings(
        geometry=base_model.geometry,
        dtype=dtype,
        limits=limits or Limits(),
        shm_dir=shm_dir,
        ram_bytes=ram_bytes,
        builder_processes=2,
        memory_dir=backend_dir if redis_url is None else None,
        now_ns=now_ns,
        clock=clock,
    )
    open_backend = backend_opener(redis_url, backend_dir, base_model.digest, clock)
    async with (
        opened(open_backend, settings) as store,
        importing(store, import_dir, delete=import_delete) as imports,
        served(store, base_model, imports, hub or HubOptions(), tokens) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield RunningStore(store, Client(channel, base_model), shm_dir, backend_dir, port)


def backend_opener(
    redis_url: str | None, directory: Path, model_digest: bytes, clock: Callable[[], float]
) -> Callable[[], Backend]:
    """Opens the backend of a directory, or that of a Redis."""
    if redis_url is None:
        return partial(FileBackend, directory, model_digest=model_digest, clock=clock)
    address = RedisAddress.parse(redis_url)
    return partial(RedisBackend, address, model_digest=model_digest, grace_ms=0)


@contextlib.asynccontextmanager
async def served(
    store: Store,
    base_model: BaseModel,
    imports: Imports,
    hub: HubOptions,
    tokens: Mapping[bytes, Caller] | None,
) -> AsyncIterator[int]:
    """The store's services at a port of this machine."""
    source = Hub(
        store,
        allowed=hub.allow,
        commits_only=hub.commits_only,
        timeout_s=hub.timeout_s,
    )
    async with serving(
        lambda server: register(server, store, base_model, imports=imports, hub=source),
        services=SERVICES,
        address="127.0.0.1:0",
        authenticator=Authenticator(None if tokens is None else lambda: tokens),
        grace_s=0,
    ) as server:
        yield server.port


def upload_requests(
    upload_id: str, weights: bytes, *, start: int = 0, end: int | None = None
) -> Iterator[pb.UploadAdapterRequest]:
    yield pb.UploadAdapterRequest(start=pb.UploadStart(upload_id=upload_id, offset=start))
    stop = len(weights) if end is None else end
    for offset in range(start, stop, CHUNK_BYTES):
        data = weights[offset : min(offset + CHUNK_BYTES, stop)]
        chunk = common_pb2.WeightChunk(offset=offset, data=data, crc32c=crc32c(data))
        yield pb.UploadAdapterRequest(chunk=chunk)
