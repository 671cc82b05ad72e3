import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lorry.client import Client
from lorry.client.retry import RetryPolicy
from lorry.rpc.errors import (
    AdapterExists,
    AdapterNotFound,
    EtagMismatch,
    InvalidRequest,
    NoWorker,
    StoreFull,
    StoreUnavailable,
)
from lorry.rpc.protocol import MAX_CHUNK_BYTES
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.scripted import ScriptedAdapters, serving_scripted

IMPATIENT = RetryPolicy(attempts=3, first_delay_s=0.001, max_delay_s=0.002)
WEIGHTS = os.urandom(3 * MAX_CHUNK_BYTES + 12345)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "reverse"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return path


@asynccontextmanager
async def client_of(adapters: ScriptedAdapters) -> AsyncIterator[Client]:
    async with (
        serving_scripted(adapters=adapters) as store,
        Client(store=store, retry=IMPATIENT) as client,
    ):
        yield client


async def test_push_uploads_every_byte_and_names_the_adapter_after_its_directory(
    directory: Path,
) -> None:
    adapters = ScriptedAdapters()
    async with client_of(adapters) as client:
        adapter = await client.adapters.push(directory, labels={"team": "a"})
    assert adapter.name == "tenants/default/adapters/reverse"
    assert adapter.labels == {"team": "a"}
    assert adapters.received == WEIGHTS


async def test_push_reports_its_progress(directory: Path) -> None:
    reports: list[tuple[int, int]] = []
    async with client_of(ScriptedAdapters()) as client:
        await client.adapters.push(
            directory, progress=lambda sent, total: reports.append((sent, total))
        )
    sent = [0, MAX_CHUNK_BYTES, 2 * MAX_CHUNK_BYTES, 3 * MAX_CHUNK_BYTES, len(WEIGHTS)]
    assert reports == [(each, len(WEIGHTS)) for each in sent]


async def test_push_continues_where_a_broken_connection_left_the_store(directory: Path) -> None:
    adapters = ScriptedAdapters(break_at_byte=2 * MAX_CHUNK_BYTES)
    async with client_of(adapters) as client:
        await client.adapters.push(directory)
    assert adapters.received == WEIGHTS
    assert adapters.offsets == [0, 2 * MAX_CHUNK_BYTES]


async def test_push_asks_before_it_replaces(directory: Path) -> None:
    adapters = ScriptedAdapters()
    async with client_of(adapters) as client:
        first = await client.adapters.push(directory)
        with pytest.raises(AdapterExists):
            await client.adapters.push(directory)
        (directory / "adapter_model.safetensors").write_bytes(b"new")
        second = await client.adapters.push(directory, replace=True)
    assert first.name == second.name
    assert first.version != second.version


async def test_replace_creates_what_is_not_there_yet(directory: Path) -> None:
    async with client_of(ScriptedAdapters()) as client:
        adapter = await client.adapters.push(directory, adapter_id="x", replace=True)
    assert adapter.name == "tenants/default/adapters/x"


async def test_a_refused_upload_arrives_as_its_error(directory: Path) -> None:
    async with client_of(ScriptedAdapters(StoreFull("no room"))) as client:
        with pytest.raises(StoreFull, match="no room"):
            await client.adapters.push(directory)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
async def test_push_names_the_file_that_is_missing(directory: Path, name: str) -> None:
    (directory / name).unlink()
    async with client_of(ScriptedAdapters()) as client:
        with pytest.raises(ValueError, match=name):
            await client.adapters.push(directory)


async def test_a_name_that_is_no_id_is_refused_before_anything_is_sent(directory: Path) -> None:
    adapters = ScriptedAdapters()
    async with client_of(adapters) as client:
        with pytest.raises(InvalidRequest, match="adapter_id"):
            await client.adapters.push(directory, adapter_id="Not/An_Id")
    assert adapters.script.calls == 0


async def test_list_goes_through_all_pages(directory: Path) -> None:
    async with client_of(ScriptedAdapters()) as client:
        for adapter_id in ("c", "a", "b"):
            await client.adapters.push(directory, adapter_id=adapter_id)
        names = [adapter.name async for adapter in client.adapters.list(page_size=2)]
    assert names == [f"tenants/default/adapters/{each}" for each in "abc"]


async def test_show_of_an_unknown_adapter_is_not_found() -> None:
    async with client_of(ScriptedAdapters()) as client:
        with pytest.raises(AdapterNotFound, match="adapters/nobody"):
            await client.adapters.show("nobody")


async def test_unavailable_is_retried() -> None:
    adapters = ScriptedAdapters(StoreUnavailable("redis is away"))
    async with client_of(adapters) as client:
        assert [adapter async for adapter in client.adapters.list()] == []
    assert adapters.script.calls == 2


async def test_delete_succeeds_when_only_its_answer_was_lost(directory: Path) -> None:
    adapters = ScriptedAdapters()
    async with client_of(adapters) as client:
        await client.adapters.push(directory)
        adapters.script.fail_next(NoWorker("lost"))
        await client.adapters.delete("reverse")
    assert not adapters.adapters


async def test_update_succeeds_when_only_its_answer_was_lost(directory: Path) -> None:
    adapters = ScriptedAdapters()
    async with client_of(adapters) as client:
        await client.adapters.push(directory, labels={"team": "a"})
        adapters.lose_next_update(pb.Adapter())
        updated = await client.adapters.update("reverse", labels={"team": "b"}, description="")
        assert updated.labels == {"team": "b"}
        assert updated == await client.adapters.show("reverse")


async def test_update_fails_when_another_took_its_place_before_the_retry(directory: Path) -> None:
    adapters = ScriptedAdapters()
    async with client_of(adapters) as client:
        await client.adapters.push(directory)
        adapters.lose_next_update(pb.Adapter(description="theirs"))
        with pytest.raises(EtagMismatch):
            await client.adapters.update("reverse", description="ours")
        assert (await client.adapters.show("reverse")).description == "theirs"


async def test_delete_of_an_unknown_adapter_fails_unless_it_may_be_missing() -> None:
    async with client_of(ScriptedAdapters()) as client:
        with pytest.raises(AdapterNotFound):
            await client.adapters.delete("nobody")
        await client.adapters.delete("nobody", missing_ok=True)
