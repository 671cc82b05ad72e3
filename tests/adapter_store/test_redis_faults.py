"""A Redis that is killed, hangs, is full, or gives back something else than it was given."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from lorry.adapter_store.redis_backend import link
from lorry.rpc.errors import (
    AdapterNotFound,
    DigestMismatch,
    LorryError,
    StoreFull,
    StoreUnavailable,
)
from lorry.rpc.status import from_rpc
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.adapter_store import CHUNK_BYTES, RunningStore, running_store, upload_requests
from tests.support.adapters import lora_config, lora_files, lora_tensors
from tests.support.redis_server import RedisServer, running_redis
from tests.support.waiting import until

CONFIG = lora_config(r=64)
WEIGHTS = [lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1] for seed in range(3)]
HALF = len(WEIGHTS[0]) // 2


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def running(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RunningStore]:
    monkeypatch.setattr(link, "TIMEOUT_S", 1.2)
    async with running_store(tmp_path, redis_url=redis_server.url) as store:
        yield store
        store.store.images.check_integrity()


async def fetched(running: RunningStore, version: bytes) -> bytes:
    call = running.client.fetch(version)
    try:
        responses = [response async for response in call]
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from error
    return b"".join(response.chunk.data for response in responses[1:])


async def eventually(running: RunningStore, version: bytes) -> bytes:
    """What is fetched once the Redis is back."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await fetched(running, version)
            except StoreUnavailable:
                await asyncio.sleep(0.05)


async def reachable(running: RunningStore, *, well: bool) -> None:
    await until(lambda: running.store.follower.reachable is well)


async def send_half(running: RunningStore, upload_id: str) -> None:
    """Send half of the weights and break off."""
    requests = iter([*upload_requests(upload_id, WEIGHTS[0], end=HALF)])
    with pytest.raises(LorryError, match=str(HALF)):
        await running.client.call(running.client.adapters.UploadAdapter, requests)


@pytest.mark.parametrize("fault", ["killed", "hanging"])
async def test_while_redis_is_away_what_is_in_memory_goes_on_and_then_all_heals(
    running: RunningStore, redis_server: RedisServer, fault: str
) -> None:
    client = running.client
    version = (await client.push("resident", CONFIG, WEIGHTS[1])).version
    cold = (await client.push("cold", CONFIG, WEIGHTS[2])).version
    image = await fetched(running, version)
    upload_id = await client.begin("new", CONFIG, WEIGHTS[0])
    await send_half(running, upload_id)
    told: list[bool] = []
    running.store.follower.when_reachable_changes(told.append)

    faults = {
        "killed": (redis_server.kill, redis_server.start),
        "hanging": (redis_server.pause, redis_server.resume),
    }
    begin, end = faults[fault]
    begin()
    await reachable(running, well=False)
    response = await client.call(client.adapters.ListAdapters, pb.ListAdaptersRequest())
    assert len(response.adapters) == 2
    assert await fetched(running, version) == image
    for failing in (
        fetched(running, cold),
        client.send(upload_id, WEIGHTS[0], start=HALF),
        client.begin("other", CONFIG, WEIGHTS[0]),
        client.call(client.adapters.DeleteAdapter, pb.DeleteAdapterRequest(name="adapters/cold")),
    ):
        with pytest.raises(StoreUnavailable) as caught:
            await failing
        assert caught.value.retry_after_s
        assert str(redis_server.port) not in str(caught.value)

    end()
    await reachable(running, well=True)
    assert told == [True, False, True]
    assert len(await eventually(running, cold)) == len(image)
    assert (await client.upload(upload_id)).received_bytes == HALF
    published = await client.send(upload_id, WEIGHTS[0], start=HALF)
    assert await fetched(running, published.version.digest)
    assert running.store.catalogue.revision == 3


async def test_redis_is_killed_again_and_again_while_uploads_and_fetches_run(
    running: RunningStore, redis_server: RedisServer
) -> None:
    """Whoever tries again gets through, with the right bytes, and nothing acknowledged is lost."""
    client = running.client
    version = (await client.push("a", CONFIG, WEIGHTS[1])).version
    image = await fetched(running, version)
    done = asyncio.Event()

    async def upload() -> None:
        upload_id = await client.begin("b", CONFIG, WEIGHTS[0])
        start = acknowledged = 0
        for kill_at in (3, 9, len(WEIGHTS[0])):
            end = min(len(WEIGHTS[0]), start + kill_at * CHUNK_BYTES)
            requests = iter([*upload_requests(upload_id, WEIGHTS[0], start=start, end=end)])
            call: Any = client.adapters.UploadAdapter(requests)
            if end < len(WEIGHTS[0]):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
                acknowledged = (await client.upload(upload_id)).received_bytes
                assert acknowledged >= start
                await asyncio.to_thread(redis_server.kill)
                await asyncio.to_thread(redis_server.start)
                await reachable(running, well=True)
                async with asyncio.timeout(60):
                    while True:
                        try:
                            start = (await client.upload(upload_id)).received_bytes
                            break
                        except StoreUnavailable:
                            await asyncio.sleep(0.05)
                assert start == acknowledged
            else:
                await call
        done.set()

    async def fetch() -> None:
        while not done.is_set():
            await running.store.images.discard(version)
            assert await eventually(running, version) == image

    await asyncio.gather(upload(), fetch())
    assert (await client.get("adapters/b")).published.max_rank == 64


async def test_a_full_redis_publishes_nothing_by_half_and_can_be_emptied(
    running: RunningStore, redis_server: RedisServer
) -> None:
    client = running.client
    first = await client.push("first", CONFIG, WEIGHTS[1])
    upload_id = await client.begin("sql", CONFIG, WEIGHTS[0])
    await send_half(running, upload_id)
    redis_server.client.config_set("maxmemory", "1mb")
    for refused in (
        client.send(upload_id, WEIGHTS[0], start=HALF),
        client.begin("other", CONFIG, WEIGHTS[0]),
    ):
        with pytest.raises(StoreFull):
            await refused
    with pytest.raises(AdapterNotFound):
        await client.get("adapters/sql")
    assert await fetched(running, first.version)
    keys = len(redis_server.client.keys("lorry:chunk:*"))
    await client.call(client.adapters.DeleteAdapter, pb.DeleteAdapterRequest(name="adapters/first"))
    redis_server.client.delete(f"lorry:lease:{first.version.hex()}")
    await until(lambda: running.store.images.num_leases == 0)
    await running.store.sweep()
    assert len(redis_server.client.keys("lorry:chunk:*")) < keys
    redis_server.client.config_set("maxmemory", "0")
    assert (await client.upload(upload_id)).received_bytes == HALF
    await client.send(upload_id, WEIGHTS[0], start=HALF)


async def test_a_publish_whose_answer_is_lost_is_found_and_not_done_twice(
    running: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Any = running.store.uploads._backend
    run = backend.link.run

    def losing(name: str, *arguments: Any) -> Any:
        answer = run(name, *arguments)
        if name == "commit":
            assert run(name, *arguments) == answer, "it is done once"
            raise StoreUnavailable("lost", retry_after_s=1.0)
        return answer

    upload_id = await running.client.begin("sql", CONFIG, WEIGHTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(backend.link, "run", losing)
        with pytest.raises(StoreUnavailable):
            await running.client.send(upload_id, WEIGHTS[0])
    published = await running.client.send(upload_id, WEIGHTS[0], start=len(WEIGHTS[0]))
    assert published.adapter == await running.client.get("adapters/sql")
    assert running.store.catalogue.revision == 1


async def test_an_upload_whose_begin_was_not_answered_goes_with_the_next_sweep(
    running: RunningStore, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client knows no id of it, so nobody else could ever end it."""
    backend: Any = running.store.uploads._backend
    run, num_active = backend.link.run, list[int]()

    def losing(name: str, *arguments: Any) -> Any:
        answer = run(name, *arguments)
        if name == "create_upload":
            num_active.append(redis_server.client.zcard("lorry:active"))
            raise StoreUnavailable("lost", retry_after_s=1.0)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(backend.link, "run", losing)
        with pytest.raises(StoreUnavailable):
            await running.client.begin("sql", CONFIG, WEIGHTS[0])
    assert num_active == [1]
    await running.store.sweep()
    assert redis_server.client.zcard("lorry:active") == 0
    await running.client.push("sql", CONFIG, WEIGHTS[0])


@pytest.mark.parametrize("damage", ["flipped", "missing"])
async def test_a_damaged_chunk_is_never_handed_out_and_the_same_upload_repairs_it(
    running: RunningStore, redis_server: RedisServer, damage: str
) -> None:
    client, redis = running.client, redis_server.client
    version = (await client.push("sql", CONFIG, WEIGHTS[0])).version
    [chunk] = redis.keys("lorry:chunk:*")
    if damage == "flipped":
        redis.setrange(chunk, 1000, bytes([WEIGHTS[0][1000] ^ 1]))
    else:
        redis.delete(chunk)
    for _ in range(2):
        with pytest.raises(DigestMismatch, match=version.hex()):
            await fetched(running, version)
    assert not redis.exists(chunk)
    assert len(redis.keys("lorry:quarantine:*")) == (damage == "flipped")
    await client.push("again", CONFIG, WEIGHTS[0])
    assert await fetched(running, version)
    assert redis.get(chunk) == WEIGHTS[0]
    assert not redis.keys("lorry:quarantine:*")


@pytest.mark.parametrize("years", [-1, 1])
async def test_a_stores_clock_may_jump(
    tmp_path: Path, redis_server: RedisServer, years: int
) -> None:
    now_ns = 1_800_000_000 * 10**9
    async with running_store(
        tmp_path, redis_url=redis_server.url, now_ns=lambda: now_ns
    ) as running:
        version = (await running.client.push("old", CONFIG, WEIGHTS[1])).version
        upload_id = await running.client.begin("sql", CONFIG, WEIGHTS[0])
        await send_half(running, upload_id)
        now_ns += years * 365 * 86_400 * 10**9
        await running.store.sweep()
        assert (await running.client.upload(upload_id)).received_bytes == HALF
        await running.client.send(upload_id, WEIGHTS[0], start=HALF)
        assert await fetched(running, version)
