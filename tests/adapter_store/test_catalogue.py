"""Watching over a real server, and the revisions behind it."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from lorry.adapter_store import catalogue as module
from lorry.adapter_store.records import Adapter
from lorry.rpc.errors import Draining, RevisionCompacted, StoreFull
from lorry.rpc.names import AdapterName
from lorry.rpc.status import from_rpc
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1 import catalogue_service_pb2 as catalogue_pb
from tests.support.adapter_store import RunningStore, running_store
from tests.support.adapters import lora_config, lora_files, lora_tensors

CONFIG = lora_config(r=2)
WEIGHTS = lora_files(CONFIG, lora_tensors(CONFIG))[1]
UPSERTED, DELETED = catalogue_pb.AdapterEvent.TYPE_UPSERTED, catalogue_pb.AdapterEvent.TYPE_DELETED


class Watch:
    """An open watch, and what it has told."""

    def __init__(self, running: RunningStore, *, store_id: str = "", after: int = 0) -> None:
        request = catalogue_pb.WatchCatalogueRequest(store_id=store_id, start_revision=after)
        self._call: Any = running.client.catalogue.WatchCatalogue(request)
        self.responses: list[catalogue_pb.WatchCatalogueResponse] = []

    async def read(self) -> catalogue_pb.WatchCatalogueResponse:
        try:
            self.responses.append(await asyncio.wait_for(self._call.read(), 30))
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error
        return self.responses[-1]

    async def until(self, revision: int) -> list[tuple[int, str]]:
        """All events up to a revision."""
        while not self.responses or not (
            self.responses[-1].revision >= revision and self.responses[-1].snapshot_complete
        ):
            await self.read()
        events = [event for response in self.responses for event in response.events]
        return [(event.type, event.adapter.name.rpartition("/")[2]) for event in events]


async def delete(running: RunningStore, adapter_id: str) -> None:
    client = running.client
    request = pb.DeleteAdapterRequest(name=f"adapters/{adapter_id}")
    await client.call(client.adapters.DeleteAdapter, request)


async def copies(running: RunningStore, count: int) -> None:
    """Add adapters without uploading each."""
    catalogue = running.store.catalogue
    original = next(iter(catalogue.after(None)))
    for i in range(count):
        name = AdapterName("default", f"copy-{i:04}")
        await catalogue.change(name, partial(copy_of, original, name))


def copy_of(original: Adapter, name: AdapterName, before: Adapter | None) -> Adapter:
    return replace(original, name=name)


async def test_a_watch_without_a_revision_begins_with_all_adapters(running: RunningStore) -> None:
    for adapter_id in ("b", "a"):
        await running.client.push(adapter_id, CONFIG, WEIGHTS)
    watch = Watch(running)
    first = await watch.read()
    assert [event.adapter.name.rpartition("/")[2] for event in first.events] == ["a", "b"]
    assert first.events[0].adapter == await running.client.get("adapters/a")
    assert (first.revision, first.snapshot_complete) == (2, True)
    await running.client.push("c", CONFIG, WEIGHTS)
    await delete(running, "a")
    assert (await watch.until(4))[2:] == [(UPSERTED, "c"), (DELETED, "a")]


async def test_an_empty_store_says_so_at_once(running: RunningStore) -> None:
    response = await Watch(running).read()
    assert (response.revision, list(response.events), response.snapshot_complete) == (0, [], True)
    assert response.store_id == running.store.catalogue.store_id


async def test_a_large_snapshot_comes_in_parts_of_which_the_last_completes_it(
    running: RunningStore,
) -> None:
    await running.client.push("a", CONFIG, WEIGHTS)
    await copies(running, 450)
    watch = Watch(running)
    events = await watch.until(451)
    assert len(events) == 451
    assert [r.snapshot_complete for r in watch.responses] == [False, False, True]


async def test_a_watch_resumes_after_the_last_revision_seen(running: RunningStore) -> None:
    for adapter_id in ("a", "b", "c"):
        await running.client.push(adapter_id, CONFIG, WEIGHTS)
    store_id = running.store.catalogue.store_id
    assert await Watch(running, store_id=store_id, after=1).until(3) == [
        (UPSERTED, "b"),
        (UPSERTED, "c"),
    ]
    assert (await Watch(running, store_id=store_id, after=3).read()).revision == 3


async def test_revisions_and_watches_continue_after_a_restart(tmp_path: Path) -> None:
    async with running_store(tmp_path) as running:
        store_id = running.store.catalogue.store_id
        for adapter_id in ("a", "b"):
            await running.client.push(adapter_id, CONFIG, WEIGHTS)
        await delete(running, "b")
    async with running_store(tmp_path) as running:
        await running.client.push("c", CONFIG, WEIGHTS)
        assert await Watch(running, store_id=store_id, after=2).until(4) == [
            (DELETED, "b"),
            (UPSERTED, "c"),
        ]


@pytest.mark.parametrize(
    ("store_id", "after"), [("another", 1), ("", 1), (None, 3), (None, 2**64 - 1)]
)
async def test_a_revision_that_is_not_this_stores_is_refused(
    running: RunningStore, store_id: str | None, after: int
) -> None:
    for adapter_id in ("a", "b"):
        await running.client.push(adapter_id, CONFIG, WEIGHTS)
    known = running.store.catalogue.store_id if store_id is None else store_id
    with pytest.raises(RevisionCompacted):
        await Watch(running, store_id=known, after=after).read()


async def test_a_revision_before_the_changes_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.adapter_store.journal.MIN_CHANGES", 3)
    async with running_store(tmp_path) as running:
        await running.client.push("a", CONFIG, WEIGHTS)
        for _ in range(2):  # folded at the sixth change, the first that outnumbers the adapters
            await copies(running, 4)
    async with running_store(tmp_path) as running:
        store_id = running.store.catalogue.store_id
        with pytest.raises(RevisionCompacted):
            await Watch(running, store_id=store_id, after=5).read()
        assert (await Watch(running, store_id=store_id, after=6).read()).revision == 6
        assert len(await Watch(running).until(9)) == 5


async def test_silence_is_broken_by_a_heartbeat(
    running: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    watch = Watch(running)
    await watch.read()
    for _ in range(3):
        response = await watch.read()
        assert (response.revision, list(response.events)) == (0, [])


async def test_draining_ends_a_watch_with_a_status(running: RunningStore) -> None:
    watch = Watch(running)
    await watch.read()
    await running.store.start_draining()
    with pytest.raises(Draining):
        await watch.read()


async def test_a_change_that_is_not_durable_is_seen_by_nobody(
    running: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreFull("no room")

    backend: Any = running.store.catalogue._backend
    with monkeypatch.context() as patch:
        patch.setattr(backend, "commit", full)
        with pytest.raises(StoreFull):
            await running.client.push("a", CONFIG, WEIGHTS)
    assert running.store.catalogue.revision == 0
    assert (await Watch(running).until(0)) == []
    await running.client.push("a", CONFIG, WEIGHTS)
    assert running.store.catalogue.revision == 1


async def test_an_upload_whose_publication_failed_for_lack_of_room_may_be_finished_later(
    running: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreFull("no room")

    upload_id = await running.client.begin("a", CONFIG, WEIGHTS)
    with monkeypatch.context() as patch:
        patch.setattr(running.store.catalogue._backend, "commit", full)
        with pytest.raises(StoreFull):
            await running.client.send(upload_id, WEIGHTS)
    await running.store.sweep()
    response = await running.client.send(upload_id, WEIGHTS, start=len(WEIGHTS))
    assert response.adapter == await running.client.get("adapters/a")


async def test_concurrent_changes_have_distinct_consecutive_revisions(
    running: RunningStore,
) -> None:
    await running.client.push("a", CONFIG, WEIGHTS)
    watch = Watch(running)
    await watch.read()
    await asyncio.gather(
        *(running.client.push(f"n-{i}", CONFIG, WEIGHTS) for i in range(6)), delete(running, "a")
    )
    await watch.until(8)
    assert running.store.catalogue.revision == 8
    assert len([event for r in watch.responses for event in r.events]) == 8
