"""FetchAdapter over a real server: handles, chunks, leases, pressure."""

import asyncio
import errno
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from crc32c import crc32c

from lorry.adapter_store import data_service
from lorry.adapter_store.images import ImageTier
from lorry.kernels.page_layout import MODULES, Dtype, PageLayout, TpStrategy
from lorry.rpc.errors import (
    AdapterIncompatible,
    DigestMismatch,
    Draining,
    InvalidRequest,
    LayoutUnsupported,
    LorryError,
    SlowReader,
    StoreFull,
    VersionNotFound,
)
from lorry.rpc.layout import layout_to_proto
from lorry.rpc.shared_directory import SharedDirectory
from lorry.rpc.shared_memory import open_shared, shm_namespace_id
from lorry.rpc.status import from_rpc
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.adapter_store import Client, RunningStore, running_store
from tests.support.adapters import TINY, build_image, lora_config, lora_files, lora_tensors
from tests.support.waiting import until

CONFIG = lora_config(r=8, targets=MODULES, rank_pattern={"v_proj": 20})
LAYOUT = PageLayout(geometry=TINY, dtype=Dtype.FP32)
HEADER, _IMAGE = build_image(CONFIG, lora_tensors(CONFIG), LAYOUT)
IMAGE = bytes(_IMAGE)


async def pushed(running: RunningStore, seed: int = 0) -> bytes:
    """The version of an adapter made from `seed`."""
    content = lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1]
    return (await running.client.push(f"a-{seed}", CONFIG, content)).version


async def push_again(running: RunningStore) -> None:
    """The same weights as another adapter's."""
    content = lora_files(CONFIG, lora_tensors(CONFIG))[1]
    await running.client.push("again", CONFIG, content)


async def read_all(call: Any) -> list[data_pb.FetchAdapterResponse]:
    """All messages of a call that ends by itself; raises the store's own error."""
    try:
        return [response async for response in call]
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from error


async def read_on(call: Any) -> None:
    """Read to the end of a call of which something was read."""
    while await read(call):
        continue


async def read(call: Any) -> data_pb.FetchAdapterResponse:
    try:
        response: data_pb.FetchAdapterResponse = await call.read()
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from error
    return response


def by_handle(running: RunningStore, version: bytes, **options: Any) -> Any:
    return running.client.fetch(
        version,
        accepted_transports=[data_pb.TRANSPORT_SHM, data_pb.TRANSPORT_CHUNKS],
        shm_namespace_id=shm_namespace_id(running.shm_dir),
        **options,
    )


async def leased(running: RunningStore, version: bytes) -> tuple[Any, data_pb.ShmHandle]:
    """An open call that holds a lease, and its handle."""
    call = by_handle(running, version)
    assert (await read(call)).HasField("header")
    return call, (await read(call)).shm


def files(running: RunningStore) -> list[str]:
    return sorted(p.name for p in running.shm_dir.iterdir() if not p.name.endswith(".lock"))


async def test_chunks_bring_the_image_that_the_pure_function_builds(running: RunningStore) -> None:
    version = await pushed(running)
    first, *rest = await read_all(running.client.fetch(version, max_chunk_bytes=5000))
    header = first.header
    assert (header.version, header.rank, header.pages) == (version, 20, HEADER.pages)
    assert (header.image_bytes, header.image_crc32c) == (len(IMAGE), crc32c(IMAGE))
    assert header.layout == layout_to_proto(LAYOUT, running.client.base_model.digest)
    for sent, built in zip(header.modules, HEADER.modules, strict=True):
        assert (sent.name, sent.row_offset) == (built.name, built.row_offset)
        assert sent.b_row_offset == built.b_row_offset
        assert list(sent.scale_per_layer) == pytest.approx(built.scale_per_layer)
    assert b"".join(response.chunk.data for response in rest) == IMAGE
    assert [response.chunk.offset for response in rest] == list(range(0, len(IMAGE), 5000))
    assert all(response.chunk.crc32c == crc32c(response.chunk.data) for response in rest)


async def test_a_fetch_resumes_at_an_offset(running: RunningStore) -> None:
    version = await pushed(running)
    _, *rest = await read_all(running.client.fetch(version, offset=12_345))
    assert rest[0].chunk.offset == 12_345
    assert b"".join(response.chunk.data for response in rest) == IMAGE[12_345:]
    assert len(await read_all(running.client.fetch(version, offset=len(IMAGE)))) == 1


def is_mapped(directory: Path) -> bool:
    return str(directory) in Path("/proc/self/maps").read_text()


async def test_a_reader_on_the_same_host_maps_the_image(running: RunningStore) -> None:
    call, handle = await leased(running, await pushed(running))
    with open_shared(running.shm_dir, handle.name, handle.bytes) as mapping:
        assert bytes(mapping) == IMAGE
        assert is_mapped(running.shm_dir)
    status = (running.shm_dir / handle.name).stat()
    assert status.st_mode & 0o777 == 0o440
    assert not call.done()
    call.cancel()


@pytest.mark.parametrize("namespace", ["", "another boot:1"])
async def test_a_reader_elsewhere_gets_chunks(running: RunningStore, namespace: str) -> None:
    version = await pushed(running)
    call = running.client.fetch(
        version,
        accepted_transports=[data_pb.TRANSPORT_SHM, data_pb.TRANSPORT_CHUNKS],
        shm_namespace_id=namespace,
    )
    assert b"".join(r.chunk.data for r in (await read_all(call))[1:]) == IMAGE


async def test_the_readers_order_of_transports_counts(running: RunningStore) -> None:
    version = await pushed(running)
    call = running.client.fetch(
        version,
        accepted_transports=[data_pb.TRANSPORT_CHUNKS, data_pb.TRANSPORT_SHM],
        shm_namespace_id=shm_namespace_id(running.shm_dir),
    )
    assert (await read_all(call))[1].HasField("chunk")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"version": b"short"}, InvalidRequest),
        ({"version": b"x" * 32}, VersionNotFound),
        ({"max_chunk_bytes": 0}, InvalidRequest),
        ({"max_chunk_bytes": (1 << 20) + 1}, InvalidRequest),
        ({"offset": 1 << 40}, InvalidRequest),
        ({"accepted_transports": [data_pb.TRANSPORT_SHM]}, InvalidRequest),
        ({"layout": data_pb.PageLayout()}, LayoutUnsupported),
    ],
)
async def test_a_fetch_that_cannot_be_served_ends_with_its_status(
    running: RunningStore, options: dict[str, Any], error: type[LorryError]
) -> None:
    version = options.pop("version", None) or await pushed(running)
    with pytest.raises(error):
        await read_all(running.client.fetch(version, **options))


async def test_a_layout_in_which_values_overflow_is_refused_and_leaves_no_file(
    tmp_path: Path,
) -> None:
    tensors = lora_tensors(CONFIG)
    next(iter(tensors.values()))[0, 0] = 1e6
    async with running_store(tmp_path) as running:
        adapter = await running.client.push("a", CONFIG, lora_files(CONFIG, tensors)[1])
        fp16 = replace(LAYOUT, dtype=Dtype.FP16)
        with pytest.raises(AdapterIncompatible):
            await read_all(running.client.fetch(adapter.version, layout=fp16))
        assert files(running) == []
        assert running.store.images.used_bytes == 0
        await read_all(running.client.fetch(adapter.version))


async def test_layouts_have_images_of_their_own(running: RunningStore) -> None:
    version = await pushed(running)
    layouts = [replace(LAYOUT, dtype=dtype) for dtype in Dtype]
    layouts.append(replace(LAYOUT, page_tokens=32))
    for layout in layouts:
        responses = await read_all(running.client.fetch(version, layout=layout))
        built = build_image(CONFIG, lora_tensors(CONFIG), layout)[1]
        assert b"".join(response.chunk.data for response in responses[1:]) == built
    assert len(files(running)) == len(layouts)


async def test_each_tensor_parallel_rank_has_an_image_of_its_own(running: RunningStore) -> None:
    version = await pushed(running)
    images = set()
    for strategy in TpStrategy:
        for rank in range(2):
            layout = replace(LAYOUT, tp_size=2, tp_rank=rank, tp_strategy=strategy)
            image = bytes(build_image(CONFIG, lora_tensors(CONFIG), layout)[1])
            _, *chunks = await read_all(running.client.fetch(version, layout=layout))
            assert b"".join(response.chunk.data for response in chunks) == image
            images.add(image)
    assert len(images) == len(files(running)) == 4


async def test_a_number_of_ranks_that_cannot_share_the_heads_is_refused(
    running: RunningStore,
) -> None:
    version = await pushed(running)
    layout = replace(LAYOUT, tp_size=2, tp_strategy=TpStrategy.SLORA)
    message = layout_to_proto(layout, running.client.base_model.digest)
    message.tp_size = 3  # of two KV heads
    with pytest.raises(LayoutUnsupported, match="tp_size 3"):
        await read_all(running.client.fetch(version, layout=message))


async def test_many_fetches_of_one_version_build_it_once(
    running: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, builds = await pushed(running), []
    build = ImageTier._build

    async def counted(self: ImageTier, key: Any) -> None:
        builds.append(key)
        await build(self, key)

    monkeypatch.setattr(ImageTier, "_build", counted)
    calls = [leased(running, version) for _ in range(64)]
    handles = {handle.name for _, handle in await asyncio.gather(*calls)}
    assert len(handles) == len(builds) == 1
    assert sum(running.store.images.counts.read_s.counts) == 1


async def test_a_fetch_that_is_cancelled_while_it_builds_leaves_nothing_behind(
    running: RunningStore,
) -> None:
    version = await pushed(running)
    calls = [by_handle(running, version) for _ in range(4)]
    for call in calls:
        call.cancel()
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await calls[0].read()
    call, _ = await leased(running, version)
    await until(lambda: running.store.images.num_leases == 1)
    call.cancel()
    await until(lambda: running.store.images.num_leases == 0)


async def test_the_least_recently_used_image_makes_room(tmp_path: Path) -> None:
    async with running_store(tmp_path, ram_bytes=2 * len(IMAGE)) as running:
        versions = [await pushed(running, seed) for seed in range(3)]
        for seed in (0, 1, 0, 2):
            await read_all(running.client.fetch(versions[seed]))
            await until(lambda: running.store.images.num_leases == 0)
        kept = {name.split(".")[1] for name in files(running)}
        assert kept == {versions[0].hex(), versions[2].hex()}
        running.store.images.check_integrity()


async def test_an_image_that_two_would_evict_goes_once(running: RunningStore) -> None:
    version, images = await pushed(running), running.store.images
    (await images.lease(version, LAYOUT)).release()
    await asyncio.gather(images.discard(version), images.discard(version))
    assert files(running) == []


async def test_an_image_that_is_leased_as_it_would_go_is_there(running: RunningStore) -> None:
    version, images = await pushed(running), running.store.images
    (await images.lease(version, LAYOUT)).release()
    _, lease = await asyncio.gather(images.discard(version), images.lease(version, LAYOUT))
    assert lease.path.read_bytes() == IMAGE
    lease.release()


async def test_an_image_that_is_built_anew_outlives_the_removal_of_its_last_one(
    running: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, images = await pushed(running), running.store.images
    (await images.lease(version, LAYOUT)).release()
    remove, is_built = SharedDirectory.remove, threading.Event()

    def remove_late(directory: SharedDirectory, path: Path) -> None:
        assert is_built.wait(30)
        remove(directory, path)

    monkeypatch.setattr(SharedDirectory, "remove", remove_late)
    discarding = asyncio.create_task(images.discard(version))
    await asyncio.sleep(0)
    lease = await images.lease(version, LAYOUT)
    is_built.set()
    await discarding
    assert lease.path.read_bytes() == IMAGE
    lease.release()


async def test_a_leased_image_is_not_evicted_but_asked_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.adapter_store.images.RECLAIM_WAIT_S", 0.3)
    async with running_store(tmp_path, ram_bytes=len(IMAGE)) as running:
        versions = [await pushed(running, seed) for seed in range(2)]
        call, handle = await leased(running, versions[0])
        with pytest.raises(StoreFull):
            await read_all(running.client.fetch(versions[1]))
        assert (await read(call)).HasField("reclaim")
        assert (running.shm_dir / handle.name).read_bytes() == IMAGE
        call.cancel()
        assert len(await read_all(running.client.fetch(versions[1]))) > 1
        assert not (running.shm_dir / handle.name).exists()


async def test_room_is_made_as_soon_as_a_reader_answers_reclaim(tmp_path: Path) -> None:
    async with running_store(tmp_path, ram_bytes=2 * len(IMAGE)) as running:
        versions = [await pushed(running, seed) for seed in range(3)]
        (older, _), (newer, _) = [await leased(running, version) for version in versions[:2]]
        fetch = asyncio.create_task(read_all(running.client.fetch(versions[2])))
        assert (await read(older)).HasField("reclaim")
        assert not fetch.done()
        older.cancel()
        assert len(await fetch) > 1
        waiting = asyncio.create_task(newer.read())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        newer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_an_image_that_is_leased_while_another_waits_for_room_is_asked_back(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path, ram_bytes=len(IMAGE)) as running:
        versions = [await pushed(running, seed) for seed in range(2)]
        served: list[bytes] = []

        async def hold(version: bytes) -> None:
            call, _ = await leased(running, version)
            served.append(version)
            assert (await read(call)).HasField("reclaim")
            call.cancel()

        # One waits for room while the other is still being built.
        holds = [asyncio.create_task(hold(version)) for version in versions]
        (first,), (second,) = await asyncio.wait(
            holds, timeout=30, return_when=asyncio.FIRST_COMPLETED
        )
        first.result()
        await until(lambda: len(served) == 2)
        second.cancel()
        await asyncio.wait([second])


async def test_images_make_room_too_where_the_memory_is_smaller_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = os.posix_fallocate

    def one_image_fits(descriptor: int, offset: int, num_bytes: int) -> None:
        if sum(path.stat().st_blocks for path in (tmp_path / "shm").iterdir()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", one_image_fits)
    async with running_store(tmp_path) as running:
        versions = [await pushed(running, seed) for seed in range(3)]
        await read_all(running.client.fetch(versions[0]))
        call, _ = await leased(running, versions[1])  # in place of the first, which is not used
        fetch = asyncio.create_task(read_all(running.client.fetch(versions[2])))
        assert (await read(call)).HasField("reclaim")
        call.cancel()
        assert len(await fetch) > 1
        running.store.images.check_integrity()


async def test_an_image_beyond_the_whole_budget_is_refused_at_once(tmp_path: Path) -> None:
    async with running_store(tmp_path, ram_bytes=len(IMAGE) - 1) as running:
        version = await pushed(running)
        with pytest.raises(StoreFull, match="budget"):
            await read_all(running.client.fetch(version))
        assert files(running) == []


async def test_a_reader_that_stops_reading_keeps_its_lease_only_while_it_is_there(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as running:
        version = await pushed(running)
        async with running.client_with("") as reader:
            call = reader.fetch(version, max_chunk_bytes=16)
            await call.read()
            await until(lambda: running.store.images.num_leases == 1)
        await until(lambda: running.store.images.num_leases == 0)


async def test_a_reader_that_takes_no_chunk_for_too_long_loses_its_lease(
    running: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_service, "STALL_S", 0.2)
    version = await pushed(running)
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}", small_window) as channel:
        reader = Client(channel, running.client.base_model)
        call = reader.fetch(version, max_chunk_bytes=16)
        await read(call)
        await until(lambda: running.store.images.num_leases == 0)
        assert not call.done()
        assert not is_mapped(running.shm_dir)  # else its memory would be kept beyond the budget
        with pytest.raises(SlowReader):
            await read_on(call)


async def test_a_reader_that_ignores_reclaim_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_service, "RECLAIM_GRACE_S", 0.2)
    async with running_store(tmp_path, ram_bytes=len(IMAGE)) as running:
        versions = [await pushed(running, seed) for seed in range(2)]
        call, _ = await leased(running, versions[0])
        other, _ = await leased(running, versions[1])
        assert (await read(call)).HasField("reclaim")
        with pytest.raises(SlowReader):
            await read(call)
        other.cancel()


async def test_a_version_lives_until_its_last_lease_ends(tmp_path: Path) -> None:
    async with running_store(tmp_path) as running:
        client, version = running.client, await pushed(running)
        call, handle = await leased(running, version)
        await client.call(
            client.adapters.DeleteAdapter, pb.DeleteAdapterRequest(name="adapters/a-0")
        )
        await running.store.sweep()
        other, _ = await leased(running, version)
        call.cancel()
        await until(lambda: running.store.images.num_leases == 1)
        await running.store.sweep()
        assert (running.shm_dir / handle.name).exists()
        other.cancel()
        await until(lambda: not files(running))
        await until(lambda: not list((running.backend_dir / "versions").iterdir()))
        with pytest.raises(VersionNotFound):
            await read_all(client.fetch(version))


async def test_draining_ends_leases_with_a_status(running: RunningStore) -> None:
    call, _ = await leased(running, await pushed(running))
    await running.store.start_draining()
    assert (await read(call)).HasField("reclaim")
    with pytest.raises(Draining):
        await read(call)


@pytest.mark.parametrize("place", [-5, 12])  # in the weights, and in the header
async def test_damaged_weights_are_never_handed_out(running: RunningStore, place: int) -> None:
    version = await pushed(running)
    path = running.backend_dir / "versions" / version.hex() / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(DigestMismatch, match=version.hex()):
            await read_all(running.client.fetch(version))
    assert files(running) == []
    await push_again(running)
    assert await read_all(running.client.fetch(version))
    assert not list((running.backend_dir / "quarantine").iterdir())


async def test_what_a_killed_store_left_in_shared_memory_is_removed(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    shm.mkdir(mode=0o750)
    for name in ("dead.lock", "dead.image", "dead.new.1"):
        (shm / name).write_bytes(b"x")
    async with running_store(tmp_path) as running:
        assert files(running) == []
        assert len(list(shm.glob("*.lock"))) == 2
    assert [path.name for path in shm.iterdir()] == ["starting.lock"]


async def test_stores_share_a_directory_without_touching_each_others_images(
    tmp_path: Path,
) -> None:
    shared = tmp_path / "shared"
    async with running_store(tmp_path / "one", shm_dir=shared) as one:
        call, handle = await leased(one, await pushed(one))
        async with running_store(tmp_path / "two", shm_dir=shared) as two:
            await read_all(two.client.fetch(await pushed(two)))
            assert len(files(two)) == 2
        assert files(one) == [handle.name]
        call.cancel()


@pytest.mark.parametrize("mode", [0o770, 0o777])
async def test_a_directory_in_which_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm").chmod(mode)
    with pytest.raises(ValueError, match="writable by this user only"):
        async with running_store(tmp_path):
            raise AssertionError


async def test_a_link_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "shm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not a directory"):
        async with running_store(tmp_path):
            raise AssertionError
