"""What every backend promises, asked of each."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from crc32c import crc32c

from lorry.adapter_store.backend import Backend, Position
from lorry.adapter_store.file_backend import FileBackend
from lorry.adapter_store.peft_config import resolve
from lorry.adapter_store.records import Adapter, Content, UploadRecord, Version
from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.backend import RedisBackend
from lorry.rpc.errors import OffsetMismatch, UploadNotFound, VersionNotFound
from lorry.rpc.names import AdapterName
from tests.support.adapters import TINY, lora_config
from tests.support.redis_server import running_redis

MIB = 1 << 20
SPEC = resolve(lora_config(), TINY)
NAME = AdapterName("default", "sql")
MODEL = b"m" * 32
BYTES = bytes(range(251)) * 12_000  # two whole chunks of a Redis and a part
DIGEST = b"d" * 32
CONTENT = Content(SPEC, crc32c(BYTES))
UPLOAD = UploadRecord(
    key="a" * 64,
    name=NAME,
    spec=SPEC,
    weights_bytes=len(BYTES),
    weights_sha256=b"s" * 32,
    labels={"team": "data"},
    expected_etag="",
    create_time_ns=1,
)
Open = Callable[[], Backend]


@pytest.fixture(params=["file", "redis"])
def open_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same backend again and again, one life after the other."""
    with contextlib.ExitStack() as stack:
        if request.param == "file":
            directory = tmp_path / "adapters"
            yield partial(reopened, stack, partial(FileBackend, directory, model_digest=MODEL))
        else:
            server = stack.enter_context(running_redis(tmp_path / "redis"))
            address = RedisAddress.parse(server.url)
            make = partial(RedisBackend, address, model_digest=MODEL, grace_ms=0)
            lives = stack.enter_context(contextlib.ExitStack())
            yield partial(reopened, lives, make)


def reopened(stack: contextlib.ExitStack, make: Open) -> Backend:
    """A new life, after the end of the one before."""
    stack.close()
    backend = make()
    stack.callback(backend.close)
    return backend


@pytest.fixture
def backend(open_backend: Open) -> Backend:
    backend = open_backend()
    backend.load()
    return backend


def adapter(etag: str, *digests: bytes, upload: str = "a" * 64) -> Adapter:
    versions = [
        Version(
            digest=digest,
            max_rank=8,
            modules=("q_proj",),
            weights_bytes=5,
            file_bytes=6,
            upload=f"{upload}{i}",
            create_time_ns=7,
        )
        for i, digest in enumerate(digests)
    ]
    return Adapter(
        name=NAME,
        published=digests[0],
        versions=tuple(versions),
        create_time_ns=1,
        update_time_ns=1,
        etag=etag,
    )


def upload(backend: Backend, key: str, data: bytes, digest: bytes) -> None:
    """Send bytes in pieces that are no whole chunks, and make them a content."""
    backend.create_upload(
        replace(UPLOAD, key=key), num_begun=backend.uploads_of("default").num_begun
    )
    for start in range(0, len(data), 300_000):
        backend.append(key, start, data[start : start + 300_000])
    backend.keep(key, digest, replace(CONTENT, file_crc32c=crc32c(data)))


def read(backend: Backend, digest: bytes) -> bytes:
    with backend.weights(digest) as (content, path):
        data = path.read_bytes()
    assert content.spec == SPEC
    assert content.file_crc32c == crc32c(data)
    return data


@pytest.mark.parametrize("piece", [MIB, 300_000, len(BYTES)])
def test_bytes_come_back_as_they_were_sent(backend: Backend, piece: int) -> None:
    backend.create_upload(UPLOAD, num_begun=0)
    for start in range(0, len(BYTES), piece):
        backend.append(UPLOAD.key, start, BYTES[start : start + piece])
    with backend.staged(UPLOAD.key) as path:
        assert path.read_bytes() == BYTES
    backend.keep(UPLOAD.key, DIGEST, CONTENT)
    assert read(backend, DIGEST) == BYTES
    backend.drop_upload(UPLOAD.key)
    assert read(backend, DIGEST) == BYTES


def test_an_upload_continues_where_it_was_in_another_life(open_backend: Open) -> None:
    backend = open_backend()
    store_id = backend.load().store_id
    backend.create_upload(UPLOAD, num_begun=0)
    backend.append(UPLOAD.key, 0, BYTES[: MIB + 5])
    backend = open_backend()
    loaded = backend.load()
    assert (loaded.store_id, loaded.uploads) == (store_id, [UPLOAD])
    found = backend.find_upload(UPLOAD.key)
    assert found is not None
    assert (found.record, found.received_bytes) == (UPLOAD, MIB + 5)
    with pytest.raises(OffsetMismatch):
        backend.append(UPLOAD.key, MIB, b"x")
    backend.append(UPLOAD.key, MIB + 5, BYTES[MIB + 5 :])
    backend.keep(UPLOAD.key, DIGEST, CONTENT)
    assert read(backend, DIGEST) == BYTES


def test_an_upload_that_was_dropped_is_unknown(backend: Backend) -> None:
    backend.create_upload(UPLOAD, num_begun=0)
    assert backend.uploads_of("default").records == [UPLOAD]
    assert backend.uploads_of("other").records == []
    backend.drop_upload(UPLOAD.key)
    backend.drop_upload(UPLOAD.key)
    assert backend.find_upload(UPLOAD.key) is None
    assert backend.uploads_of("default").records == []
    with pytest.raises(UploadNotFound):
        backend.append(UPLOAD.key, 0, b"x")


def test_only_idle_uploads_expire(backend: Backend) -> None:
    backend.create_upload(UPLOAD, num_begun=0)
    assert backend.drop_expired(3600, busy=()) == []
    assert backend.drop_expired(60.0, busy={UPLOAD.key}) == []
    assert backend.drop_expired(-1.0, busy=()) == [UPLOAD.key]
    assert backend.find_upload(UPLOAD.key) is None


def test_changes_count_up_and_are_loaded_again(open_backend: Open) -> None:
    backend = open_backend()
    backend.load()
    upload(backend, "a" * 64, BYTES, DIGEST)
    first = adapter("one", DIGEST)
    changes = [
        backend.commit(NAME, None, first),
        backend.commit(NAME, first, replace(first, etag="two", description="new")),
    ]
    assert [change.revision for change in changes] == [1, 2]
    loaded = open_backend().load()
    assert loaded.position == Position(2, changes[-1].commit)
    assert list(loaded.changes) == changes
    assert [a.description for a in loaded.adapters] == ["new"]


def test_a_content_stays_while_an_upload_or_a_name_refers_to_it(backend: Backend) -> None:
    upload(backend, "a" * 64, BYTES, DIGEST)
    first = adapter("one", DIGEST)
    backend.commit(NAME, None, first)
    backend.drop_upload("a" * 64)
    assert backend.unreferenced() == []
    backend.commit(NAME, first, None)
    assert backend.unreferenced() == [DIGEST]
    backend.drop(DIGEST)
    backend.drop(DIGEST)
    assert backend.unreferenced() == []
    with pytest.raises(VersionNotFound):
        read(backend, DIGEST)


def test_the_same_content_again_is_kept_once(backend: Backend) -> None:
    for key in ("a" * 64, "b" * 64):
        upload(backend, key, BYTES, DIGEST)
    backend.commit(NAME, None, adapter("one", DIGEST))
    for key in ("a" * 64, "b" * 64):
        backend.drop_upload(key)
    assert read(backend, DIGEST) == BYTES
    assert backend.unreferenced() == []
