"""Uploads that break off, are resumed, damaged, forgotten, or too many."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from lorry.adapter_store.limits import Limits, TenantLimits
from lorry.rpc.errors import (
    AdapterInvalid,
    AdapterNotFound,
    DeadlineExpired,
    DigestMismatch,
    InvalidRequest,
    OffsetMismatch,
    Superseded,
    TenantLimit,
    UploadNotFound,
)
from lorry.rpc.status import from_rpc
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.adapter_store import (
    CHUNK_BYTES,
    Client,
    RunningStore,
    running_store,
    upload_requests,
)
from tests.support.adapters import lora_config, lora_files, lora_tensors
from tests.support.waiting import until

CONFIG = lora_config(r=64)
WEIGHTS = lora_files(CONFIG, lora_tensors(CONFIG))[1]
HALF = len(WEIGHTS) // 2
assert len(WEIGHTS) > 8 * CHUNK_BYTES


async def until_received(running: RunningStore, upload_id: str, num_bytes: int) -> None:
    upload = await running.store.uploads.get(upload_id, "default")
    await until(lambda: upload.received_bytes >= num_bytes)


async def received_bytes(client: Client, upload_id: str) -> int:
    return (await client.upload(upload_id)).received_bytes


async def send_half(client: Client, upload_id: str) -> None:
    """Send half of the weights and end the stream."""
    with pytest.raises(OffsetMismatch, match=str(HALF)):
        await client.call(
            client.adapters.UploadAdapter, iter([*upload_requests(upload_id, WEIGHTS, end=HALF)])
        )


def open_stream(client: Client, upload_id: str, start: int, end: int) -> Any:
    """Send a part of the weights on a stream that stays open."""

    async def requests() -> AsyncIterator[pb.UploadAdapterRequest]:
        for request in upload_requests(upload_id, WEIGHTS, start=start, end=end):
            yield request
        await asyncio.Event().wait()

    return client.adapters.UploadAdapter(requests())


async def test_what_was_received_is_kept_when_the_stream_ends_early(client: Client) -> None:
    upload_id = await client.begin("sql", CONFIG, WEIGHTS)
    await send_half(client, upload_id)
    assert await received_bytes(client, upload_id) == HALF
    response = await client.send(upload_id, WEIGHTS, start=HALF)
    assert response.adapter == await client.get("adapters/sql")


async def test_a_client_that_vanishes_in_mid_stream_may_resume(running: RunningStore) -> None:
    client = running.client
    upload_id = await client.begin("sql", CONFIG, WEIGHTS)
    call = open_stream(client, upload_id, 0, 3 * CHUNK_BYTES)
    await until_received(running, upload_id, 3 * CHUNK_BYTES)
    call.cancel()
    await client.send(upload_id, WEIGHTS, start=3 * CHUNK_BYTES)


async def test_a_stream_that_never_starts_is_ended(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.adapter_store.adapter_service.REQUEST_S", 0.1)
    silent: Any = client.adapters.UploadAdapter(timeout=60)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await silent
    error = from_rpc(failed.value)
    assert isinstance(error, DeadlineExpired)
    assert str(error) == "start did not come within 0.1 s"


async def test_an_upload_survives_a_restart_of_the_store(tmp_path: Path) -> None:
    async with running_store(tmp_path) as running:
        upload_id = await running.client.begin("sql", CONFIG, WEIGHTS)
        await send_half(running.client, upload_id)
    async with running_store(tmp_path) as running:
        assert await received_bytes(running.client, upload_id) == HALF
        await running.client.send(upload_id, WEIGHTS, start=HALF)


async def test_a_newer_stream_takes_the_place_of_the_older(running: RunningStore) -> None:
    client = running.client
    upload_id = await client.begin("sql", CONFIG, WEIGHTS)
    older = asyncio.Event()

    async def requests() -> AsyncIterator[pb.UploadAdapterRequest]:
        sent = list(upload_requests(upload_id, WEIGHTS))
        for request in sent[:3]:
            yield request
        await older.wait()
        yield sent[3]

    call = client.adapters.UploadAdapter(requests())
    await until_received(running, upload_id, 2 * CHUNK_BYTES)
    newer = [*upload_requests(upload_id, WEIGHTS, start=2 * CHUNK_BYTES, end=HALF)]
    with pytest.raises(OffsetMismatch):
        await client.call(client.adapters.UploadAdapter, iter(newer))
    older.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert isinstance(from_rpc(caught.value), Superseded)
    await client.send(upload_id, WEIGHTS, start=HALF)


@pytest.mark.parametrize("offset", [0, HALF - 1, HALF + 1, len(WEIGHTS), 1 << 60])
async def test_an_upload_continues_only_where_it_ended(client: Client, offset: int) -> None:
    upload_id = await client.begin("sql", CONFIG, WEIGHTS)
    await send_half(client, upload_id)
    start = pb.UploadAdapterRequest(start=pb.UploadStart(upload_id=upload_id, offset=offset))
    with pytest.raises(OffsetMismatch) as caught:
        await client.call(client.adapters.UploadAdapter, iter([start]))
    assert caught.value.metadata["receivedBytes"] == str(HALF)


async def test_chunks_with_gaps_damage_or_a_wrong_size_are_refused_and_not_kept(
    client: Client,
) -> None:
    upload_id = await client.begin("sql", CONFIG, WEIGHTS)
    start, first, second = list(upload_requests(upload_id, WEIGHTS))[:3]
    damaged = pb.UploadAdapterRequest()
    damaged.CopyFrom(first)
    damaged.chunk.crc32c ^= 1
    empty = pb.UploadAdapterRequest()
    empty.CopyFrom(first)
    empty.chunk.data, empty.chunk.crc32c = b"", 0
    for requests, error in [
        ([start, second], OffsetMismatch),
        ([start, damaged], DigestMismatch),
        ([start, empty], InvalidRequest),
        ([first], InvalidRequest),
        ([start, start], InvalidRequest),
        ([], InvalidRequest),
    ]:
        with pytest.raises(error):
            await client.call(client.adapters.UploadAdapter, iter(requests))
        assert await received_bytes(client, upload_id) == 0
    await client.send(upload_id, WEIGHTS)


async def test_more_bytes_than_announced_are_refused(client: Client) -> None:
    upload_id = await client.begin("sql", CONFIG, WEIGHTS, num_bytes=CHUNK_BYTES + 1)
    with pytest.raises(InvalidRequest, match=r"chunk\.data"):
        await client.send(upload_id, WEIGHTS)
    assert await received_bytes(client, upload_id) == CHUNK_BYTES


async def test_bytes_with_another_digest_than_announced_are_refused(client: Client) -> None:
    upload_id = await client.begin("sql", CONFIG, WEIGHTS, sha256=b"x" * 32)
    with pytest.raises(DigestMismatch):
        await client.send(upload_id, WEIGHTS)
    with pytest.raises(AdapterNotFound):
        await client.get("adapters/sql")


async def test_a_client_that_missed_the_answer_gets_it_again(client: Client) -> None:
    upload_id = await client.begin("sql", CONFIG, WEIGHTS)
    first = await client.send(upload_id, WEIGHTS)
    assert await client.send(upload_id, WEIGHTS, start=len(WEIGHTS)) == first
    bad_id = await client.begin("bad", CONFIG, WEIGHTS[:-1])
    for start in (0, len(WEIGHTS) - 1):
        with pytest.raises(AdapterInvalid, match="weights"):
            await client.send(bad_id, WEIGHTS[:-1], start=start)


async def test_a_client_whose_store_died_before_the_answer_learns_what_was_published(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as running:
        upload_id = await running.client.begin("sql", CONFIG, WEIGHTS)
        [directory] = (running.backend_dir / "uploads").iterdir()
        kept = tmp_path / "kept"
        shutil.copytree(directory, kept)
        published = await running.client.send(upload_id, WEIGHTS)
    (kept / "weights.part").write_bytes(WEIGHTS)
    shutil.copytree(kept, directory)  # as if killed before the bytes were dropped
    async with running_store(tmp_path) as running:
        state = await running.client.upload(upload_id)
        assert (state.received_bytes, state.adapter) == (len(WEIGHTS), published.adapter)
        assert await running.client.send(upload_id, WEIGHTS, start=len(WEIGHTS)) == published
        await running.store.sweep()
        assert not directory.exists()
        assert await running.client.send(upload_id, WEIGHTS, start=len(WEIGHTS)) == published


async def test_an_upload_is_known_only_to_its_tenant_and_while_its_version_is_kept(
    running: RunningStore,
) -> None:
    client = running.client
    upload_id = await client.begin("sql", CONFIG, WEIGHTS)
    await client.send(upload_id, WEIGHTS)
    assert await running.store.uploads.published(upload_id, "other") is None
    await client.call(client.adapters.DeleteAdapter, pb.DeleteAdapterRequest(name="adapters/sql"))
    assert await running.store.uploads.published(upload_id, "default") is None


async def test_publishing_goes_on_when_the_client_leaves_after_the_last_byte(
    running: RunningStore,
) -> None:
    client = running.client
    upload_id = await client.begin("sql", CONFIG, WEIGHTS)
    call = open_stream(client, upload_id, 0, len(WEIGHTS))
    await until_received(running, upload_id, len(WEIGHTS))
    call.cancel()
    await until(lambda: running.store.catalogue.num_adapters == 1)
    assert (await client.get("adapters/sql")).published.max_rank == 64


async def test_an_upload_that_nobody_moves_on_is_forgotten(tmp_path: Path) -> None:
    now_s = 1_000_000.0

    async with running_store(tmp_path, clock=lambda: now_s) as running:
        client = running.client
        upload_id = await client.begin("sql", CONFIG, WEIGHTS)
        now_s += 3599
        await send_half(client, upload_id)
        now_s += 3599
        await running.store.sweep()
        assert await received_bytes(client, upload_id) == HALF
        now_s += 1
        await running.store.sweep()
        with pytest.raises(UploadNotFound):
            await received_bytes(client, upload_id)
        assert not list((running.backend_dir / "uploads").iterdir())


async def test_finished_uploads_leave_no_bytes_behind(tmp_path: Path) -> None:
    async with running_store(tmp_path) as running:
        await running.client.push("sql", CONFIG, WEIGHTS)
        with pytest.raises(DigestMismatch):
            await running.client.push("bad", CONFIG, WEIGHTS, sha256=b"x" * 32)
        assert not list((running.backend_dir / "uploads").iterdir())


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (Limits(tenant=TenantLimits(uploads=1)), "uploads"),
        (Limits(tenant=TenantLimits(adapters=1)), "adapters"),
        (Limits(tenant=TenantLimits(bytes=2 * len(WEIGHTS) - 1)), "bytes"),
    ],
)
async def test_a_tenant_has_limits_and_is_told_which(
    tmp_path: Path, limits: Limits, what: str
) -> None:
    async with running_store(tmp_path, limits=limits) as running:
        await running.client.begin("one", CONFIG, WEIGHTS)
        with pytest.raises(TenantLimit) as caught:
            await running.client.begin("two", CONFIG, WEIGHTS)
        assert caught.value.metadata["what"] == what


async def test_stored_versions_count_against_the_limit_until_they_are_deleted(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path, limits=Limits(tenant=TenantLimits(adapters=1))) as running:
        client = running.client
        await client.push("one", CONFIG, WEIGHTS)
        with pytest.raises(TenantLimit):
            await client.begin("two", CONFIG, WEIGHTS)
        await client.call(
            client.adapters.DeleteAdapter, pb.DeleteAdapterRequest(name="adapters/one")
        )
        await client.push("two", CONFIG, WEIGHTS)


async def test_versions_beyond_those_kept_are_deleted(tmp_path: Path) -> None:
    async with running_store(tmp_path, limits=Limits(versions_kept=2)) as running:
        client, etag = running.client, ""
        for seed in range(4):
            content = lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1]
            etag = (await client.push("sql", CONFIG, content, etag=etag)).etag
        response = await client.call(
            client.adapters.ListAdapterVersions, pb.ListAdapterVersionsRequest(name="adapters/sql")
        )
        digests = {version.digest.hex() for version in response.versions}
        assert len(digests) == 2
        await running.store.sweep()
        versions = running.backend_dir / "versions"
        await until(lambda: {path.name for path in versions.iterdir()} == digests)


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter_id": "Upper"},
        {"adapter_id": ""},
        {"adapter_id": "../up"},
        {"weights_bytes": 0},
        {"weights_bytes": 1 << 50},
        {"weights_sha256": b"short"},
        {"labels": {"": ""}},
        {"config_json": "{"},
    ],
)
async def test_a_malformed_request_for_an_upload_is_refused(
    client: Client, fields: dict[str, Any]
) -> None:
    valid: dict[str, Any] = {
        "adapter_id": "sql",
        "config_json": lora_files(CONFIG, {})[0],
        "weights_bytes": 10,
        "weights_sha256": b"x" * 32,
    }
    request = pb.CreateUploadRequest(**(valid | fields))
    with pytest.raises(InvalidRequest):
        await client.call(client.adapters.CreateUpload, request)
