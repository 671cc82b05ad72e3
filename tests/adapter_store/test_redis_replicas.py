"""Several stores that share a Redis: one catalogue, one history, one owner of every byte."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from lorry.adapter_store.backend import Outdated, Position
from lorry.adapter_store.limits import Limits, TenantLimits
from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.backend import RedisBackend
from lorry.rpc.errors import (
    AdapterExists,
    AdapterNotFound,
    EtagMismatch,
    OffsetMismatch,
    RevisionCompacted,
    TenantLimit,
)
from lorry.rpc.status import from_rpc
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1 import catalogue_service_pb2 as catalogue_pb
from tests.support.adapter_store import RunningStore, running_store, upload_requests
from tests.support.adapters import lora_config, lora_files, lora_tensors
from tests.support.redis_server import RedisServer, running_redis
from tests.support.waiting import until

CONFIG = lora_config(r=4)
WEIGHTS = [lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1] for seed in range(4)]
Pair = tuple[RunningStore, RunningStore]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


@contextlib.asynccontextmanager
async def pair(directory: Path, server: RedisServer, **options: Any) -> AsyncIterator[Pair]:
    async with (
        running_store(directory / "a", redis_url=server.url, **options) as a,
        running_store(directory / "b", redis_url=server.url, **options) as b,
    ):
        yield a, b


@pytest.fixture
async def stores(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Pair]:
    async with pair(tmp_path, redis_server) as both:
        yield both


async def known(store: RunningStore, revision: int) -> None:
    """Once a store has learned of a revision."""
    await until(lambda: store.store.catalogue.revision >= revision)


async def listed_again(store: RunningStore, store_id: str) -> None:
    """Once a store goes by revisions of another id."""
    await until(lambda: store.store.catalogue.store_id != store_id)


async def delete(store: RunningStore, adapter_id: str) -> None:
    request = pb.DeleteAdapterRequest(name=f"adapters/{adapter_id}")
    await store.client.call(store.client.adapters.DeleteAdapter, request)


async def events(store: RunningStore, store_id: str, after: int, upto: int) -> list[Any]:
    """(revision of the message, type, name) of all changes in between."""
    request = catalogue_pb.WatchCatalogueRequest(store_id=store_id, start_revision=after)
    call: Any = store.client.catalogue.WatchCatalogue(request)
    found: list[Any] = []
    async for response in call:
        found += [(event.type, event.adapter.name) for event in response.events]
        if response.revision >= upto:
            call.cancel()
            return found
    raise AssertionError


async def test_a_watcher_goes_on_at_another_store_after_the_last_revision_seen(
    stores: Pair,
) -> None:
    a, b = stores
    await a.client.push("one", CONFIG, WEIGHTS[0])
    await b.client.push("two", CONFIG, WEIGHTS[1])
    await delete(a, "one")
    store_id = a.store.catalogue.store_id
    assert b.store.catalogue.store_id == store_id
    expected = await events(a, store_id, 1, 3)
    assert len(expected) == 2
    assert await events(b, store_id, 1, 3) == expected
    assert await b.client.get("adapters/two") == await a.client.get("adapters/two")


async def test_a_store_that_is_behind_learns_what_a_watcher_has_seen_elsewhere(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def idle(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("lorry.adapter_store.follower.Follower.run", idle)
    async with pair(tmp_path, redis_server) as (a, b):
        await a.client.push("one", CONFIG, WEIGHTS[0])
        assert b.store.catalogue.revision == 0
        assert await events(b, a.store.catalogue.store_id, 1, 1) == []
        assert b.store.catalogue.revision == 1


async def test_an_upload_goes_on_at_another_store_and_its_answer_is_known_to_both(
    stores: Pair,
) -> None:
    a, b = stores
    upload_id = await a.client.begin("sql", CONFIG, WEIGHTS[0])
    half = len(WEIGHTS[0]) // 2
    with pytest.raises(OffsetMismatch):
        await a.client.call(
            a.client.adapters.UploadAdapter,
            iter([*upload_requests(upload_id, WEIGHTS[0], end=half)]),
        )
    assert (await b.client.upload(upload_id)).received_bytes == half
    published = await b.client.send(upload_id, WEIGHTS[0], start=half)
    for store in stores:
        assert (await store.client.upload(upload_id)).adapter == published.adapter
        assert await store.client.send(upload_id, WEIGHTS[0], start=half) == published
    assert a.store.catalogue.revision == 1


async def test_both_stores_may_finish_an_upload_and_it_is_published_once(stores: Pair) -> None:
    a, b = stores
    upload_id = await a.client.begin("sql", CONFIG, WEIGHTS[0])
    key = (await a.store.uploads.get(upload_id, "default")).record.key
    await asyncio.to_thread(a.store.uploads._backend.append, key, 0, WEIGHTS[0])
    answers = await asyncio.gather(
        *(s.client.send(upload_id, WEIGHTS[0], start=len(WEIGHTS[0])) for s in (a, b, a, b))
    )
    assert all(answer == answers[0] for answer in answers)
    await known(b, 1)
    assert a.store.catalogue.revision == b.store.catalogue.revision == 1


async def test_of_those_who_publish_a_name_at_once_one_wins(stores: Pair) -> None:
    results = await asyncio.gather(
        *(stores[i % 2].client.push("sql", CONFIG, content) for i, content in enumerate(WEIGHTS)),
        return_exceptions=True,
    )
    winners = [result for result in results if isinstance(result, pb.Adapter)]
    assert len(winners) == 1
    assert sum(isinstance(result, AdapterExists) for result in results) == 3
    results = await asyncio.gather(
        *(
            stores[i % 2].client.push("sql", CONFIG, content, etag=winners[0].etag)
            for i, content in enumerate(WEIGHTS)
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(result, pb.Adapter) for result in results) == 1
    assert sum(isinstance(result, EtagMismatch) for result in results) == 3
    for store in stores:
        await known(store, 2)
        assert store.store.catalogue.revision == 2


async def test_concurrent_changes_are_learned_by_all_in_one_order(stores: Pair) -> None:
    names = [f"n-{i}" for i in range(8)]
    await asyncio.gather(
        *(stores[i % 2].client.push(name, CONFIG, WEIGHTS[0]) for i, name in enumerate(names))
    )
    await asyncio.gather(*(delete(stores[i % 2], name) for i, name in enumerate(names[:4])))
    for store in stores:
        await known(store, 12)
    a, b = (store.store.catalogue for store in stores)
    assert list(a._changes) == list(b._changes)
    assert list(a.after(None)) == list(b.after(None))


async def test_a_tenants_limit_holds_for_all_stores_together(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    limits = Limits(tenant=TenantLimits(uploads=2))
    async with pair(tmp_path, redis_server, limits=limits) as stores:
        results = await asyncio.gather(
            *(stores[i % 2].client.begin(f"n-{i}", CONFIG, WEIGHTS[0]) for i in range(6)),
            return_exceptions=True,
        )
        assert sum(isinstance(result, str) for result in results) == 2
        assert sum(isinstance(result, TenantLimit) for result in results) == 4


async def test_a_version_stays_while_another_store_hands_it_out(
    stores: Pair, redis_server: RedisServer
) -> None:
    a, b = stores
    version = (await a.client.push("sql", CONFIG, WEIGHTS[0])).version
    call = b.client.fetch(version)
    await call.read()
    await delete(a, "sql")
    await known(b, 2)
    await a.store.sweep()
    content = f"lorry:content:{version.hex()}"
    assert redis_server.client.exists(content)
    call.cancel()
    redis_server.client.delete(f"lorry:lease:{version.hex()}")  # as it expires by itself
    await until(lambda: b.store.images.num_leases == 0)
    await b.store.sweep()
    assert not redis_server.client.exists(content)
    assert not redis_server.client.keys("lorry:chunk*")


def opened(server: RedisServer) -> RedisBackend:
    return RedisBackend(RedisAddress.parse(server.url), model_digest=None, grace_ms=0)


async def test_a_store_that_fell_behind_what_is_kept_lists_again(
    stores: Pair, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = stores
    for i, content in enumerate(WEIGHTS):
        await a.client.push(f"n-{i}", CONFIG, content)
    await known(b, 4)
    redis_server.client.xtrim("lorry:events", maxlen=1, approximate=False)
    backend = opened(redis_server)
    with pytest.raises(RevisionCompacted):
        backend.changes(Position(2, list(a.store.catalogue._changes)[1].commit))
    assert backend.changes(Position(3))[0].revision == 4
    loaded = backend.load()
    assert (loaded.position.revision, len(loaded.adapters), len(loaded.changes)) == (4, 4, 1)
    backend.close()


async def test_a_change_of_something_else_than_is_there_is_outdated(
    stores: Pair, redis_server: RedisServer
) -> None:
    await stores[0].client.push("sql", CONFIG, WEIGHTS[0])
    backend = opened(redis_server)
    [adapter] = backend.load().adapters
    for before in (None, replace(adapter, etag="stale")):
        with pytest.raises(Outdated):
            backend.commit(adapter.name, before, replace(adapter, etag="new"))
    record = backend.uploads_of("default").records
    assert record == []
    backend.close()


async def test_who_watched_changes_that_redis_lost_is_told_to_list_again(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """Its data are those of an earlier time, as of a replica that took over too early."""
    async with pair(tmp_path, redis_server) as (a, b):
        await a.client.push("kept", CONFIG, WEIGHTS[0])
        redis_server.kill()
        shutil.copytree(redis_server.directory, tmp_path / "earlier")
        redis_server.start()
        await until(lambda: b.store.follower.reachable)
        await a.client.push("lost", CONFIG, WEIGHTS[1])
        await known(b, 2)
        store_id = b.store.catalogue.store_id
        watch: Any = b.client.catalogue.WatchCatalogue(
            catalogue_pb.WatchCatalogueRequest(store_id=store_id, start_revision=2)
        )
        assert (await watch.read()).revision == 2
        redis_server.kill()
        shutil.rmtree(redis_server.directory / "appendonlydir")
        shutil.copytree(
            tmp_path / "earlier" / "appendonlydir", redis_server.directory / "appendonlydir"
        )
        redis_server.start()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(watch.read(), 60)
        assert isinstance(from_rpc(caught.value), RevisionCompacted)
        for store in (a, b):
            await listed_again(store, store_id)
            with pytest.raises(AdapterNotFound):
                await store.client.get("adapters/lost")
        await b.client.push("new", CONFIG, WEIGHTS[1])


async def test_stores_go_on_with_a_redis_that_was_emptied(
    stores: Pair, redis_server: RedisServer
) -> None:
    a, b = stores
    await a.client.push("lost", CONFIG, WEIGHTS[0])
    await known(b, 1)
    store_id = a.store.catalogue.store_id
    redis_server.client.flushall()
    for store in stores:
        await listed_again(store, store_id)
        assert store.store.catalogue.num_adapters == 0
    adapter = await b.client.push("new", CONFIG, WEIGHTS[0])
    await known(a, 1)
    assert await a.client.get("adapters/new") == adapter
    assert a.store.catalogue.store_id == b.store.catalogue.store_id
