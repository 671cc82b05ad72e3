"""`lorry adapters copy` and `check`: between directories and Redis, broken off, damaged."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorry.adapter_store.backend_url import BackendUrl
from lorry.adapter_store.copying import Copy
from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.client.commands.backends import check, copy
from lorry.rpc.errors import AdapterExists
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.adapter_store import RunningStore, running_store
from tests.support.adapters import lora_config, lora_files, lora_tensors
from tests.support.redis_server import RedisServer, running_redis

CONFIG = lora_config(r=64)
WEIGHTS = [lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1] for seed in range(3)]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


async def filled(running: RunningStore) -> list[pb.Adapter]:
    """A name with two versions, one with labels, and one that shares a version."""
    client = running.client
    first = await client.push("sql", CONFIG, WEIGHTS[0])
    second = await client.push("sql", CONFIG, WEIGHTS[1], etag=first.etag)
    labelled = await client.push("labelled", CONFIG, WEIGHTS[2], labels={"team": "data"})
    return [second, labelled, await client.push("shared", CONFIG, WEIGHTS[0])]


async def all_of(running: RunningStore) -> dict[str, Any]:
    """What a store has: its adapters, and the images of all versions."""
    found: dict[str, Any] = {}
    for adapter in running.store.catalogue.after(None):
        found[str(adapter.name)] = adapter
        for version in adapter.versions:
            call = running.client.fetch(version.digest)
            found[version.digest.hex()] = [r.chunk.data async for r in call][1:]
    return found


@pytest.fixture
async def source(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A directory with adapters, and what its store served."""
    async with running_store(tmp_path) as running:
        await filled(running)
        return (tmp_path / "adapters").as_uri(), await all_of(running)


def run_all(work: Copy, progress: Callable[[int], None]) -> None:
    for step in work.steps:
        work.run(step, progress)


async def test_everything_moves_to_a_redis_and_back(
    tmp_path: Path,
    redis_server: RedisServer,
    source: tuple[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, expected = source
    await asyncio.to_thread(copy, source=url, target=redis_server.url)
    async with running_store(tmp_path, redis_url=redis_server.url) as running:
        assert await all_of(running) == expected
        assert running.store.catalogue.revision == 3
    back = tmp_path / "back"
    for _ in range(2):  # the second has nothing left to do
        uri = (back / "adapters").as_uri()
        await asyncio.to_thread(copy, source=redis_server.url, target=uri)
    assert "copied 0 adapters, 0 failed" in capsys.readouterr().out
    async with running_store(back, model=tmp_path / "model") as running:
        assert await all_of(running) == expected
        assert not list((back / "adapters" / "uploads").iterdir())
    assert not redis_server.client.keys("lorry:upload:*")


async def test_a_copy_that_was_broken_off_goes_on(
    tmp_path: Path, redis_server: RedisServer, source: tuple[str, dict[str, Any]]
) -> None:
    url, expected = source
    directory, target = BackendUrl.parse(url), BackendUrl.parse(redis_server.url)

    class Broken(Exception):
        pass

    num_bytes = 0

    def break_off(sent: int) -> None:
        nonlocal num_bytes
        num_bytes += sent
        if num_bytes > len(WEIGHTS[0]):
            raise Broken

    from_backend = directory.open(model_digest=None)
    to_backend = target.open(model_digest=from_backend.model_digest)
    work = Copy(from_backend, to_backend, replace=False)
    with pytest.raises(Broken):
        run_all(work, break_off)
    assert to_backend.load().uploads
    from_backend.close()
    to_backend.close()
    await asyncio.to_thread(copy, source=url, target=redis_server.url)
    async with running_store(tmp_path, redis_url=redis_server.url) as running:
        assert await all_of(running) == expected


async def test_another_adapter_of_the_same_name_is_replaced_only_if_asked(
    tmp_path: Path, redis_server: RedisServer, source: tuple[str, dict[str, Any]]
) -> None:
    url, expected = source
    async with running_store(tmp_path, redis_url=redis_server.url) as running:
        await running.client.push("sql", CONFIG, WEIGHTS[2])
        with pytest.raises(AdapterExists, match="sql"):
            await asyncio.to_thread(copy, source=url, target=redis_server.url)
        assert running.store.catalogue.num_adapters == 1
        await asyncio.to_thread(copy, source=url, target=redis_server.url, replace=True)
        await running.store.catalogue.catch_up()
        assert await all_of(running) == expected


async def test_a_check_finds_what_is_damaged_and_repairs_it_from_a_copy(
    tmp_path: Path,
    redis_server: RedisServer,
    source: tuple[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, expected = source
    redis = redis_server.client
    await asyncio.to_thread(copy, source=url, target=redis_server.url)
    await asyncio.to_thread(check, backend=redis_server.url)
    flipped, missing, _ = redis.keys("lorry:chunk:*")
    redis.setrange(flipped, 9, bytes([redis.getrange(flipped, 9, 9)[0] ^ 1]))
    redis.delete(missing)
    with pytest.raises(SystemExit):
        await asyncio.to_thread(check, backend=redis_server.url)
    out = capsys.readouterr().out
    assert "checked 3 versions, 2 damaged or missing, 2 still" in out
    await asyncio.to_thread(check, backend=redis_server.url, repair_from=url)
    assert "2 damaged or missing, 0 still" in capsys.readouterr().out
    redis.hincrby("lorry:chunks", flipped.decode().rpartition(":")[2], 1)
    redis.set("lorry:chunk:stray", b"x")
    with pytest.raises(SystemExit):
        await asyncio.to_thread(check, backend=redis_server.url)
    told = capsys.readouterr().err
    assert "has 1 owners, but 2 are counted" in told
    assert "chunk stray belongs to nothing" in told
    async with running_store(tmp_path, redis_url=redis_server.url) as running:
        assert await all_of(running) == expected


async def test_a_directory_is_checked_and_repaired_from_a_redis(
    tmp_path: Path,
    redis_server: RedisServer,
    source: tuple[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, expected = source
    await asyncio.to_thread(copy, source=url, target=redis_server.url)
    weights = sorted((tmp_path / "adapters" / "versions").glob("*/weights.safetensors"))
    weights[0].write_bytes(b"x" + weights[0].read_bytes()[1:])
    await asyncio.to_thread(check, backend=url, repair_from=redis_server.url)
    assert "1 damaged or missing, 0 still" in capsys.readouterr().out
    async with running_store(tmp_path) as running:
        assert await all_of(running) == expected


def test_a_password_is_shown_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hidden\n")
    address = RedisAddress.parse("rediss://user@host/2", password_file=file)
    assert address.password == "hidden"
    for text in (str(address), repr(address), json.dumps(str(address))):
        assert "hidden" not in text
    assert str(address) == "rediss://user@host:6379/2"
    for url in ("redis://u:hidden@host/x", "redis://u:hidden@host:port", "ftp://u:hidden@host"):
        with pytest.raises(ValueError, match="backend must be") as caught:
            BackendUrl.parse(url)
        assert "hidden" not in str(caught.value)
