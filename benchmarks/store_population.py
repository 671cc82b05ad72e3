"""Thousands of small adapters in a store: made, registered, listed and fetched."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.store import requests
from benchmarks.store_process import RunningStore
from lorry.adapter_store.image import image_bytes
from lorry.adapter_store.peft_config import resolve
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.rpc.layout import layout_to_proto
from lorry.rpc.weight_chunk import fetch_adapter, upload_adapter
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from tests.support.adapters import TINY, lora_config, lora_files, lora_tensors

RANKS = (8, 16, 32, 64)
LABELS = 100  # values of the label that lists are filtered by
PAGE_SIZE = 100
CLIENTS = 8
LAYOUT = PageLayout(geometry=TINY, dtype=Dtype.FP32)


@dataclass(frozen=True)
class Files:
    """Adapters of mixed ranks that differ in one weight each."""

    configs: dict[int, str]
    weights: dict[int, bytes]

    @classmethod
    def make(cls) -> "Files":
        files = {}
        for rank in RANKS:
            config = lora_config(r=rank)
            files[rank] = lora_files(config, lora_tensors(config))
        return cls({r: f[0] for r, f in files.items()}, {r: f[1] for r, f in files.items()})

    def of(self, number: int) -> tuple[str, bytes]:
        """adapter_config.json and the safetensors file; the last weight is the adapter's number."""
        rank = rank_of(number)
        weight = np.float32(number).tobytes()
        return self.configs[rank], self.weights[rank][: -len(weight)] + weight


def rank_of(number: int) -> int:
    return RANKS[number % len(RANKS)]


def bytes_of(number: int) -> int:
    """Of an adapter's page image."""
    return image_bytes(resolve(lora_config(r=rank_of(number)), TINY), LAYOUT)


async def timed(call: Awaitable[Any]) -> float:
    start_s = time.perf_counter()
    await call
    return time.perf_counter() - start_s


async def register(store: RunningStore, files: Files, count: int) -> list[float]:
    """Upload all adapters by `CLIENTS` at once; seconds of each."""
    stub, send = AdapterServiceStub(store.channel), upload_adapter(store.channel)
    numbers = iter(range(count))
    seconds: list[float] = []

    async def upload(number: int) -> None:
        config, weights = files.of(number)
        begun: Any = await stub.CreateUpload(
            pb.CreateUploadRequest(
                adapter_id=adapter_id(number),
                config_json=config,
                weights_bytes=len(weights),
                weights_sha256=hashlib.sha256(weights).digest(),
                labels={"group": str(number % LABELS)},
            )
        )
        await send(requests(begun.upload_id, weights))

    async def client() -> None:
        for number in numbers:
            seconds.append(await timed(upload(number)))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return seconds


def adapter_id(number: int) -> str:
    return f"adapter-{number:05d}"


async def list_all(store: RunningStore, filter: str = "") -> tuple[list[float], dict[str, bytes]]:
    """Seconds of each page, and the version of each name."""
    stub, request = AdapterServiceStub(store.channel), pb.ListAdaptersRequest(page_size=PAGE_SIZE)
    request.filter = filter
    seconds, versions = list[float](), dict[str, bytes]()
    while True:
        start_s = time.perf_counter()
        page: Any = await stub.ListAdapters(request)
        seconds.append(time.perf_counter() - start_s)
        versions.update((a.name.rpartition("/")[2], a.version) for a in page.adapters)
        request.page_token = page.next_page_token
        if not request.page_token:
            return seconds, versions


class Reader:
    """Fetches page images in chunks, one after another, as a worker on another host does."""

    def __init__(self, store: RunningStore, model_digest: bytes, versions: dict[str, bytes]):
        self._fetch = fetch_adapter(store.channel)
        self._layout = layout_to_proto(LAYOUT, model_digest)
        self._versions = versions

    async def fetch(self, number: int) -> None:
        request = data_pb.FetchAdapterRequest(
            version=self._versions[adapter_id(number)], layout=self._layout
        )
        async for _ in self._fetch(request):
            pass
