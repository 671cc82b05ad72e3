"""The service as a process: its line, its health, how it ends, and what survives it."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import OffsetMismatch
from lorry.rpc.shared_memory import shm_namespace_id
from lorry.v1 import adapter_data_service_pb2 as data_pb
from tests.support.adapter_store import Client, upload_requests, write_base_model
from tests.support.adapters import lora_config, lora_files, lora_tensors
from tests.support.command import child_environment
from tests.support.redis_server import running_redis
from tests.support.waiting import until

CONFIG = lora_config(r=4)
SERVING = health_pb2.HealthCheckResponse.SERVING


class StoreProcess(NamedTuple):
    process: asyncio.subprocess.Process
    client: Client
    shm_dir: Path

    async def end(self, number: int) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(30):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def started(directory: Path, backend: str | None = None) -> AsyncIterator[StoreProcess]:
    """``python -m lorry.adapter_store`` once it listens; killed on exit."""
    model, shm_dir = write_base_model(directory / "model"), directory / "shm"
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "lorry.adapter_store", "--address", "127.0.0.1:0"],
        *["--model", str(model)],
        *["--backend", backend or (directory / "my adapters").as_uri()],
        *["--shm-dir", str(shm_dir)],
        env=child_environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("lorry.adapter_store listening on 127.0.0.1:")
        async with grpc.aio.insecure_channel(line.split()[-1]) as channel:
            yield StoreProcess(process, Client(channel, read_base_model(model)), shm_dir)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def push(client: Client, adapter_id: str, seed: int = 0) -> bytes:
    content = lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1]
    return (await client.push(adapter_id, CONFIG, content)).version


async def image(client: Client, version: bytes) -> bytes:
    responses = [response async for response in client.fetch(version)]
    return b"".join(response.chunk.data for response in responses[1:])


async def test_it_becomes_ready_and_drains_on_sigterm(tmp_path: Path) -> None:
    async with started(tmp_path) as store:
        stub: Any = health_pb2_grpc.HealthStub(store.client.channel)
        for service in ("", "readiness", "lorry.v1.AdapterService"):
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
            async with asyncio.timeout(30):
                while (await watch.read()).status != SERVING:
                    continue
            watch.cancel()
        version = await push(store.client, "sql")
        call = store.client.fetch(
            version,
            accepted_transports=[data_pb.TRANSPORT_SHM],
            shm_namespace_id=shm_namespace_id(store.shm_dir),
        )
        await call.read()
        await call.read()
        assert await store.end(signal.SIGTERM) == 0
        assert [path.name for path in store.shm_dir.iterdir()] == ["starting.lock"]


async def test_what_it_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    async with started(tmp_path) as store:
        versions = [await push(store.client, f"a-{seed}", seed) for seed in range(3)]
        images = [await image(store.client, version) for version in versions]
        await store.end(signal.SIGKILL)
    assert len(list((tmp_path / "shm").iterdir())) > 3
    assert len(list((tmp_path / "my adapters" / "versions").iterdir())) == 3
    async with started(tmp_path) as store:
        for seed, version in enumerate(versions):
            assert (await store.client.get(f"adapters/a-{seed}")).version == version
            assert await image(store.client, version) == images[seed]


async def test_a_killed_store_loses_nothing_of_a_redis_and_another_goes_on(tmp_path: Path) -> None:
    content = lora_files(CONFIG, lora_tensors(CONFIG, seed=1))[1]
    with running_redis(tmp_path / "redis") as server:
        url = server.url
        async with started(tmp_path / "a", url) as first, started(tmp_path / "b", url) as b:
            version = await push(first.client, "a-0")
            expected = await image(first.client, version)
            upload_id = await first.client.begin("a-1", CONFIG, content)
            part = iter([*upload_requests(upload_id, content, end=len(content) // 2)])
            with pytest.raises(OffsetMismatch):
                await first.client.call(first.client.adapters.UploadAdapter, part)
            await first.end(signal.SIGKILL)
            assert await image(b.client, version) == expected
            await b.client.send(upload_id, content, start=len(content) // 2)
            await b.end(signal.SIGKILL)
        async with started(tmp_path / "b", url) as again:
            for seed in range(2):
                adapter = await again.client.get(f"adapters/a-{seed}")
                assert await image(again.client, adapter.version)


async def test_killing_it_leaves_no_builder_behind(tmp_path: Path) -> None:
    async with started(tmp_path) as store:
        await push(store.client, "sql")
        builders = children(store.process.pid)
        assert builders
        await store.end(signal.SIGKILL)
        await until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in builders))


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


async def test_neither_the_store_nor_its_builders_load_torch(tmp_path: Path) -> None:
    async with started(tmp_path) as store:
        version = await push(store.client, "sql")
        await image(store.client, version)
        for pid in (store.process.pid, *children(store.process.pid)):
            assert "libtorch" not in mapped_files(pid)


def mapped_files(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--backend", "redis://:secret@host:port"], "backend must be redis"),
        (["--backend", "redis://:secret@127.0.0.1:1"], "127.0.0.1:1/0 cannot be used"),
        (["--backend", "file://host/path"], "backend"),
        (["--ram-bytes", "0"], "ram_bytes"),
        (["--ram-bytes", str(1 << 60)], "the size of the file system"),
        (["--versions-kept", "0"], "versions_kept"),
        (["--address", "0.0.0.0:0"], "address"),
    ],
)
async def test_a_wrong_option_is_named(tmp_path: Path, options: list[str], problem: str) -> None:
    write_base_model(tmp_path)
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "lorry.adapter_store", "--model", str(tmp_path)],
        *["--shm-dir", str(tmp_path / "shm"), *options],
        env=child_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        _, stderr = await process.communicate()
    assert process.returncode == 1
    assert problem in stderr.decode()
    assert "Traceback" not in stderr.decode()
    assert "secret" not in stderr.decode()
