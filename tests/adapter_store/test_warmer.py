"""Pins and prefetch through real stores."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lorry.adapter_store.image import image_bytes
from lorry.adapter_store.memory_file import Memory, MemoryFile
from lorry.adapter_store.peft_config import resolve
from lorry.adapter_store.pins import MAX_PINS, Pins
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.rpc.errors import AdapterNotFound, PermissionDenied, StoreFull, StoreUnavailable
from lorry.rpc.identity import Caller, Role
from lorry.rpc.names import AdapterName
from lorry.v1 import store_admin_service_pb2 as pb
from tests.support.adapter_store import Client, RunningStore, running_store
from tests.support.adapters import TINY, lora_config, lora_files, lora_tensors
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
CONFIG = lora_config(r=4)
IMAGE_BYTES = image_bytes(resolve(CONFIG, TINY), PageLayout(geometry=TINY, dtype=Dtype.FP32))


async def push(client: Client, adapter_id: str, seed: int, **options: Any) -> bytes:
    weights = lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1]
    return (await client.push(adapter_id, CONFIG, weights, **options)).version


async def fetch(running: RunningStore, version: bytes) -> None:
    """Fetch an image and wait for the end of its lease."""
    async for _ in running.client.fetch(version):
        pass
    await until(lambda: running.store.images.num_leases == 0)


async def pin(running: RunningStore, name: str) -> pb.Pin:
    request = pb.PinImageRequest(name=name)
    response: pb.PinImageResponse = await running.client.call(
        running.client.admin.PinImage, request
    )
    return response.pin


def resident(running: RunningStore, version: bytes) -> int:
    return len(running.store.images.resident(version))


async def test_the_most_wanted_images_are_built_at_the_next_start(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as running:
        versions = [await push(running.client, f"a-{seed}", seed) for seed in range(4)]
        for seed in (0, 1, 2, 2, 3, 3, 3):
            await fetch(running, versions[seed])
    async with running_store(tmp_path, ram_bytes=2 * IMAGE_BYTES) as running:
        await until(lambda: running.store.images.counts.built_ahead == 2)
        assert [resident(running, version) for version in versions] == [0, 0, 1, 1]
        assert running.store.images.num_images == 2
        await fetch(running, versions[0])  # the least wanted of those built ahead makes room
        assert [resident(running, version) for version in versions] == [1, 0, 0, 1]
        running.store.images.check_integrity()


async def test_a_pinned_image_is_not_evicted_and_its_pin_survives_a_restart(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path, ram_bytes=2 * IMAGE_BYTES) as running:
        versions = [await push(running.client, f"a-{seed}", seed) for seed in range(3)]
        await fetch(running, versions[2])
        pinned = await pin(running, "adapters/a-0")
        assert pinned == pb.Pin(
            name="tenants/default/adapters/a-0",
            version=versions[0],
            images=1,
            image_bytes=IMAGE_BYTES,
        )
        for version in versions[1:]:
            await fetch(running, version)
            assert resident(running, versions[0])
    async with running_store(tmp_path, ram_bytes=2 * IMAGE_BYTES) as running:
        await until(lambda: resident(running, versions[0]) == 1)
        client = running.client
        listed = await client.call(client.admin.ListPins, pb.ListPinsRequest())
        assert [each.name for each in listed.pins] == ["tenants/default/adapters/a-0"]
        request = pb.UnpinImageRequest(name="adapters/a-0")
        await client.call(client.admin.UnpinImage, request)
        for version in versions[1:]:
            await fetch(running, version)
        assert not resident(running, versions[0])


async def test_what_a_pinned_name_publishes_anew_is_built_ahead(running: RunningStore) -> None:
    first = await push(running.client, "a", 0)
    await fetch(running, first)
    await pin(running, "adapters/a")
    etag = (await running.client.get("adapters/a")).etag
    second = await push(running.client, "a", 1, etag=etag)
    await running.store.sweep()
    assert resident(running, second)


async def test_pins_beyond_their_share_are_refused(tmp_path: Path) -> None:
    async with running_store(tmp_path, ram_bytes=3 * IMAGE_BYTES) as running:
        versions = [await push(running.client, f"a-{seed}", seed) for seed in range(2)]
        await fetch(running, versions[0])
        await pin(running, "adapters/a-0")
        with pytest.raises(StoreFull, match="half of the store's budget"):
            await pin(running, "adapters/a-1")
        with pytest.raises(AdapterNotFound):
            await pin(running, "adapters/absent")
        assert [name.adapter for name in running.store.warmer.pins] == ["a-0"]


async def test_the_number_of_pins_is_bounded(running: RunningStore) -> None:
    names = [AdapterName("acme", f"a-{number}") for number in range(MAX_PINS)]
    pins = Pins(names, running.store.catalogue)
    pins.add(names[0])
    with pytest.raises(StoreFull, match=f"{MAX_PINS} adapters"):
        pins.add(AdapterName("acme", "one-more"))
    assert pins.versions() == frozenset()


async def test_a_pin_that_cannot_be_written_down_is_none(running: RunningStore) -> None:
    await push(running.client, "a", 0)
    (running.backend_dir / ".memory.json.new").mkdir()  # so that nothing can be written there
    with pytest.raises(StoreUnavailable, match="memory"):
        await pin(running, "adapters/a")
    assert list(running.store.warmer.pins) == []


async def test_a_store_that_cannot_write_down_its_memory_ends_as_it_should(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_store(tmp_path) as running:
        version = await push(running.client, "a", 0)
        (running.backend_dir / ".memory.json.new").mkdir()
    assert "memory.json cannot be written" in caplog.text
    async with running_store(tmp_path) as running:
        await fetch(running, version)


def test_a_store_without_a_place_for_its_memory_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert MemoryFile(tmp_path, TINY).read() == Memory()
    assert not caplog.records
    assert MemoryFile(None, TINY).read() == Memory()
    assert "there is no --memory-dir" in caplog.text


@pytest.mark.parametrize(
    "path", ["docker-compose.redis.yml", "deploy/kubernetes/components/redis/adapter-store.yaml"]
)
def test_stores_over_a_redis_are_deployed_with_a_place_for_their_memory(path: str) -> None:
    """Which is their volume; a file:// backend has a directory by itself."""
    content = (ROOT / path).read_text()
    assert re.search(r"LORRY_ADAPTER_STORE_MEMORY_DIR(:|, value:) /var/lib/lorry\b", content)


async def test_only_admins_pin(tmp_path: Path) -> None:
    callers = {sha256(b"m").digest(): Caller("acme", frozenset({Role.MANAGE}))}
    async with running_store(tmp_path, tokens=callers) as running, running.client_with("m") as acme:
        with pytest.raises(PermissionDenied):
            await acme.call(acme.admin.PinImage, pb.PinImageRequest(name="adapters/a"))
