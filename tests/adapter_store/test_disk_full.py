"""A store whose disk is really full: a small tmpfs, or where that needs root, files that may not
grow."""

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorry.adapter_store import file_backend
from lorry.rpc.errors import LorryError, StoreFull
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.adapter_store import RunningStore, running_store
from tests.support.adapters import lora_config, lora_files, lora_tensors

CONFIG = lora_config(r=64)
DISK_BYTES = 1 << 20


def weights(seed: int) -> bytes:
    return lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1]


@pytest.fixture
def full_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory whose file system, or whose files, cannot hold many adapters."""
    directory = tmp_path / "disk"
    directory.mkdir()
    monkeypatch.setattr(file_backend, "SPARE_BYTES", 0)  # writes themselves have to fail
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(weights(0)) // 2, before[1]))
    try:
        yield directory
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


async def image(running: RunningStore, version: bytes) -> bytes:
    responses = [response async for response in running.client.fetch(version)]
    return b"".join(response.chunk.data for response in responses[1:])


async def test_a_full_disk_refuses_uploads_and_loses_nothing(
    full_soon: Path, tmp_path: Path
) -> None:
    shm_dir = tmp_path / "shm"
    versions: dict[str, bytes] = {}
    async with running_store(full_soon, shm_dir=shm_dir) as running:
        refused: LorryError | None = None
        for seed in range(100):
            try:
                adapter = await running.client.push(f"a-{seed}", CONFIG, weights(seed))
            except LorryError as error:
                refused = error
                break
            versions[adapter.name] = adapter.version
        assert isinstance(refused, StoreFull) or not versions
        images = {name: await image(running, version) for name, version in versions.items()}
    async with running_store(full_soon, shm_dir=shm_dir) as running:
        for name, version in versions.items():
            assert (await running.client.get(name)).version == version
            assert await image(running, version) == images[name]
        if versions:
            for name in list(versions)[:2]:  # the upload that found no room has kept its bytes
                await delete(running, name)
            await running.store.sweep()
            await running.client.push("after", CONFIG, weights(1000))


async def delete(running: RunningStore, name: str) -> None:
    client = running.client
    await client.call(client.adapters.DeleteAdapter, pb.DeleteAdapterRequest(name=name))
