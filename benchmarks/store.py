"""How fast a worker gets an adapter from the store, beside a plain memory copy in the same run.

    python -m benchmarks.store

The store is the real process, the adapter one of rank 16 on all modules of Llama-3-8B. Each round
takes, one after another: a copy between two buffers (the yardstick), a fetch from disk (the image
is built), a fetch through shared memory (call, map, copy into a buffer), the copy of such a mapping
alone, that of a file in small pages, a fetch by gRPC chunks, and as many chunks from a server that
does nothing but send one message again and again: what grpc.aio itself can do here.

The store has memory for two images, so that each is built in the memory of one that went, as in a
store that has run for a while. A virtual machine that gives free memory back to its host needs
longer to get it again than to build an image: 0.2 s for 80 MiB.
"""

import argparse
import asyncio
import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import ml_dtypes
import numpy as np
from crc32c import crc32c

from benchmarks.results_file import host_name, spread, write_result
from lorry.adapter_store.image import image_bytes
from lorry.adapter_store.peft_config import resolve
from lorry.kernels.page_layout import MODULES, Dtype, ModelGeometry, PageLayout
from lorry.rpc.base_model import read_base_model
from lorry.rpc.channel import open_channel
from lorry.rpc.heap import keep_freed_memory
from lorry.rpc.layout import layout_to_proto
from lorry.rpc.shared_memory import open_shared, shm_namespace_id
from lorry.rpc.weight_chunk import (
    DATA_SERVICE,
    FETCH_ADAPTER,
    Chunk,
    encode_chunk,
    fetch_adapter,
    upload_adapter,
)
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from tests.support.adapter_store import write_base_model
from tests.support.adapters import lora_config, lora_files, lora_tensors

REPO = Path(__file__).parents[1]
LLAMA_3_8B = ModelGeometry(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336
)
CHUNK_BYTES = 1 << 20
CONFIG = lora_config(r=16, targets=MODULES)


class Fetcher:
    """What a worker does, and its target buffer."""

    def __init__(self, channel: grpc.aio.Channel, shm_dir: Path, layout: data_pb.PageLayout):
        self._fetch = fetch_adapter(channel)
        self._shm_dir = shm_dir
        self._layout = layout
        self.allocate(0)

    async def hold(self, version: bytes) -> tuple[Any, data_pb.ShmHandle]:
        """An open call that leases the image, and its handle."""
        call: Any = self._fetch(
            data_pb.FetchAdapterRequest(
                version=version,
                layout=self._layout,
                accepted_transports=[data_pb.TRANSPORT_SHM],
                shm_namespace_id=shm_namespace_id(self._shm_dir),
            )
        )
        await call.read()
        return call, (await call.read()).shm

    async def by_shared_memory(self, version: bytes) -> None:
        call, handle = await self.hold(version)
        self.copy_mapping(handle)
        call.cancel()

    def copy_mapping(self, handle: data_pb.ShmHandle) -> None:
        with open_shared(self._shm_dir, handle.name, handle.bytes) as mapping:
            np.copyto(self.target, np.frombuffer(mapping, np.uint8))

    async def by_chunks(self, version: bytes, fetch: Any = None) -> None:
        request = data_pb.FetchAdapterRequest(version=version, layout=self._layout)
        async for chunk in (fetch or self._fetch)(request):
            if isinstance(chunk, Chunk):
                assert crc32c(chunk.data) == chunk.crc32c
                end = chunk.offset + len(chunk.data)
                self.target[chunk.offset : end] = np.frombuffer(chunk.data, np.uint8)

    def copy_small_pages(self, file: int) -> None:
        with mmap.mmap(file, self.target.nbytes, prot=mmap.PROT_READ) as mapping:
            np.copyto(self.target, np.frombuffer(mapping, np.uint8))

    def huge_bytes(self, handle: data_pb.ShmHandle) -> int:
        """How much of an image is mapped in huge pages."""
        with open_shared(self._shm_dir, handle.name, handle.bytes) as mapping:
            np.copyto(self.target, np.frombuffer(mapping, np.uint8))
            _, _, found = Path("/proc/self/smaps").read_text().partition(handle.name)
        field = found[found.index("ShmemPmdMapped:") :].split()
        return int(field[1]) << 10

    def allocate(self, num_bytes: int) -> None:
        self.target = np.zeros(num_bytes, np.uint8)
        self.source = np.ones(num_bytes, np.uint8)

    def copy(self) -> None:
        self.target[:] = self.source


async def serve_bare(num_chunks: int) -> None:
    """Send one message as often as an image has chunks."""
    data = bytes(CHUNK_BYTES)
    message = encode_chunk(Chunk(0, data, crc32c(data)))

    async def send(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(num_chunks):
            yield message

    methods: Any = {FETCH_ADAPTER: grpc.unary_stream_rpc_method_handler(send)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(DATA_SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """A Python process; the address that its first line ends with."""
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(30)


async def push(channel: grpc.aio.Channel, adapter_id: str, seed: int) -> tuple[bytes, float, int]:
    """Upload an adapter; its version, the seconds it took, and its bytes."""
    tensors = lora_tensors(CONFIG, LLAMA_3_8B, seed=seed, dtype=ml_dtypes.bfloat16)
    config_json, weights = lora_files(CONFIG, tensors)
    stub = AdapterServiceStub(channel)
    start_s = time.monotonic()
    upload: Any = await stub.CreateUpload(
        pb.CreateUploadRequest(
            adapter_id=adapter_id,
            config_json=config_json,
            weights_bytes=len(weights),
            weights_sha256=hashlib.sha256(weights).digest(),
        )
    )
    response: Any = await upload_adapter(channel)(requests(upload.upload_id, weights))
    return response.version.digest, time.monotonic() - start_s, len(weights)


def requests(upload_id: str, weights: bytes) -> Iterator[pb.UploadAdapterRequest | Chunk]:
    yield pb.UploadAdapterRequest(start=pb.UploadStart(upload_id=upload_id))
    for offset in range(0, len(weights), CHUNK_BYTES):
        data = weights[offset : offset + CHUNK_BYTES]
        yield Chunk(offset, data, crc32c(data))


@contextmanager
def small_pages(directory: Path, num_bytes: int) -> Iterator[int]:
    """An open file of a directory in shared memory, which a store would have in huge pages."""
    with (directory / "small-pages").open("wb+") as file:
        file.write(os.urandom(num_bytes))
        file.flush()
        yield file.fileno()


async def timed(work: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    result = work()
    if asyncio.iscoroutine(result):
        await result
    return time.perf_counter() - start_s


async def measure(fetcher: Fetcher, version: bytes, bare: Any, small: int) -> dict[str, float]:
    """One round. Everything but the fetch from disk finds the image in memory."""
    start_s = time.perf_counter()
    call, handle = await fetcher.hold(version)
    from_disk_s = time.perf_counter() - start_s
    fetcher.allocate(handle.bytes)
    fetcher.copy()
    copy_s = await timed(fetcher.copy)
    shared_s = await timed(lambda: fetcher.by_shared_memory(version))
    mapped_s = await timed(lambda: fetcher.copy_mapping(handle))
    small_s = await timed(lambda: fetcher.copy_small_pages(small))
    chunks_s = await timed(lambda: fetcher.by_chunks(version))
    bare_s = await timed(lambda: fetcher.by_chunks(version, bare))
    huge_mib = fetcher.huge_bytes(handle) / 2**20
    call.cancel()
    gigabytes = handle.bytes / 1e9
    return {
        "memcpy_gb_per_s": gigabytes / copy_s,
        "shared_memory_gb_per_s": gigabytes / shared_s,
        "shared_memory_share_of_memcpy": copy_s / shared_s,
        "map_and_copy_share_of_memcpy": copy_s / mapped_s,
        "small_pages_share_of_memcpy": copy_s / small_s,
        "mapped_in_huge_pages_mib": huge_mib,
        "chunks_gb_per_s": gigabytes / chunks_s,
        "bare_grpc_gb_per_s": gigabytes / bare_s,
        "chunks_share_of_bare_grpc": bare_s / chunks_s,
        "from_disk_ms": from_disk_s * 1e3,
    }


async def benchmark(rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        directory, shm_dir = Path(name), Path(shm)
        model = write_base_model(directory / "model", LLAMA_3_8B)
        digest = read_base_model(model).digest
        layout = PageLayout(geometry=LLAMA_3_8B, dtype=Dtype.BF16)
        num_bytes = image_bytes(resolve(CONFIG, LLAMA_3_8B), layout)
        with (
            running(
                *["lorry.adapter_store", "--address", "127.0.0.1:0", "--model", str(model)],
                *["--backend", (directory / "adapters").as_uri(), "--shm-dir", str(shm_dir)],
                *["--ram-bytes", str(2 * num_bytes)],
            ) as address,
            running("benchmarks.store", "--bare", str(num_bytes // CHUNK_BYTES)) as bare_address,
            small_pages(shm_dir, num_bytes) as small,
        ):
            async with open_channel(address) as channel, open_channel(bare_address) as bare:
                fetcher = Fetcher(channel, shm_dir, layout_to_proto(layout, digest))
                bare_fetch = fetch_adapter(bare)
                measured = []
                for seed in range(rounds + 1):
                    pushed, upload_s, weights_bytes = await push(channel, f"a-{seed}", seed)
                    measured.append(await measure(fetcher, pushed, bare_fetch, small))
                    measured[-1]["upload_mb_per_s"] = weights_bytes / upload_s / 1e6
    config: dict[str, Any] = {"model": "llama-3-8b", "rank": CONFIG["r"], "modules": MODULES}
    config["image_bytes"] = fetcher.target.nbytes
    kept = measured[1:]
    return config, {key: spread([one[key] for one in kept], digits=3) for key in kept[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()  # as store and worker do
    if arguments.bare:
        asyncio.run(serve_bare(arguments.bare))
        return
    config, metrics = asyncio.run(benchmark(arguments.rounds))
    write_result(
        "store",
        benchmark="store",
        device=host_name(),
        config=config | {"rounds": arguments.rounds},
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
