"""A store that dies at any step, and which Redis it trusts."""

import logging
import resource
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lorry.adapter_store.peft_config import resolve
from lorry.adapter_store.records import Adapter, Content, UploadRecord, Version
from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.backend import RedisBackend
from lorry.client.commands import certs
from lorry.rpc.errors import RevisionCompacted, StoreFull, StoreUnavailable
from lorry.rpc.names import AdapterName
from tests.support.adapters import TINY, lora_config
from tests.support.redis_server import RedisServer, running_redis

MODEL = b"m" * 32
NAME = AdapterName("default", "sql")
SPEC = resolve(lora_config(), TINY)
CONTENTS = [bytes([i]) * ((1 << 20) + 70_000) for i in range(2)]
ACL = "~lorry:* +@read +@write +@scripting +@connection +info +time +config|get"


class Died(BaseException):
    """The store was killed here."""


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


def opened(server: RedisServer, model: bytes | None = MODEL) -> RedisBackend:
    return RedisBackend(RedisAddress.parse(server.url), model_digest=model, grace_ms=0)


def adapter(i: int) -> Adapter:
    digest = sha256(CONTENTS[i]).digest()
    version = Version(
        digest=digest,
        max_rank=8,
        modules=("q_proj",),
        weights_bytes=1,
        file_bytes=len(CONTENTS[i]),
        upload=f"key-{i}",
        create_time_ns=1,
    )
    return Adapter(
        name=NAME,
        published=digest,
        versions=(version,),
        create_time_ns=1,
        update_time_ns=1,
        etag=f"etag-{i}",
    )


def publish(backend: RedisBackend, i: int) -> None:
    """Upload and publish from wherever a life before this one came to."""
    wanted = adapter(i)
    now = next(iter(backend.load().adapters), None)
    key, data = f"key-{i}", CONTENTS[i]
    if now != wanted:
        record = UploadRecord(
            key=key,
            name=NAME,
            spec=SPEC,
            weights_bytes=len(data),
            weights_sha256=b"s" * 32,
            labels={},
            expected_etag="",
            create_time_ns=1,
        )
        if backend.find_upload(key) is None:
            backend.create_upload(record, num_begun=backend.uploads_of("default").num_begun)
        stored = backend.find_upload(key)
        assert stored is not None
        for start in range(stored.received_bytes, len(data), 700_000):
            backend.append(key, start, data[start : start + 700_000])
        with backend.staged(key) as path:
            assert path.read_bytes() == data
        backend.keep(key, wanted.published, Content(SPEC, 0))
        backend.commit(NAME, now, wanted)
    backend.drop_upload(key)


def dying(backend: RedisBackend, step: int) -> None:
    """Let the backend's `step`-th script be the last: odd ones still run, even ones do not."""
    link: Any = backend.link
    run, left = link.run, step

    def counted(name: str, *arguments: Any) -> Any:
        nonlocal left
        left -= 2
        if left == 0:
            raise Died
        answer = run(name, *arguments)
        if left == -1:
            raise Died
        return answer

    link.run = counted


def test_a_store_may_die_at_every_step_of_an_upload_and_a_publish(
    redis_server: RedisServer,
) -> None:
    """The next life finishes it; nothing is half there, done twice, or left without an owner."""
    redis_server.client.config_set("appendfsync", "no")
    step, died = 0, True
    while died:
        step += 1
        redis_server.client.flushall()
        publish_once(redis_server)
        backend = opened(redis_server)
        dying(backend, step)
        died = dies(backend)
        backend.close()
        backend = opened(redis_server)
        assert backend.problems() == []
        publish(backend, 1)
        for digest in backend.unreferenced():
            backend.drop(digest)
        loaded = backend.load()
        assert (loaded.position.revision, loaded.adapters, loaded.uploads) == (2, [adapter(1)], [])
        with backend.weights(adapter(1).published) as (_, path):
            assert path.read_bytes() == CONTENTS[1]
        assert backend.problems() == []
        assert len(redis_server.client.keys("lorry:content:*")) == 2  # and its chunks
        backend.close()
    assert step > 25


def publish_once(server: RedisServer) -> None:
    backend = opened(server)
    publish(backend, 0)
    backend.close()


def dies(backend: RedisBackend) -> bool:
    try:
        publish(backend, 1)
        for digest in backend.unreferenced():
            backend.drop(digest)
    except Died:
        return True
    return False


def begin(backend: RedisBackend, i: int) -> str:
    """Upload without a publish; the key."""
    record = UploadRecord(
        key=f"key-{i}",
        name=NAME,
        spec=SPEC,
        weights_bytes=len(CONTENTS[i]),
        weights_sha256=b"s" * 32,
        labels={},
        expected_etag="",
        create_time_ns=1,
    )
    backend.create_upload(record, num_begun=backend.uploads_of("default").num_begun)
    for start in range(0, len(CONTENTS[i]), 1 << 20):
        backend.append(record.key, start, memoryview(CONTENTS[i])[start : start + (1 << 20)])
    return record.key


def test_a_full_scratch_directory_is_no_fault_of_the_bytes(redis_server: RedisServer) -> None:
    """What is short is told, and neither an upload nor a version is taken for damaged."""
    backend = opened(redis_server)
    publish(backend, 0)
    key = begin(backend, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, before[1]))  # a write is cut short there
    try:
        with pytest.raises(StoreUnavailable, match="scratch"), backend.staged(key):
            pass
        reading = backend.weights(adapter(0).published)
        with pytest.raises(StoreUnavailable, match="scratch"), reading:
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with backend.staged(key) as path:
        assert path.read_bytes() == CONTENTS[1]
    with backend.weights(adapter(0).published) as (_, path):
        assert path.read_bytes() == CONTENTS[0]
    assert backend.problems() == []
    backend.close()


def test_a_tail_is_sealed_only_as_it_was_hashed(redis_server: RedisServer) -> None:
    backend = opened(redis_server)
    key = begin(backend, 1)
    tail = CONTENTS[1][1 << 20 :]
    for num_chunks, num_bytes in ((1, len(tail) - 1), (0, len(tail))):
        backend.link.run("seal", key, num_chunks, sha256(tail[:-1]).hexdigest(), num_bytes)
    with backend.staged(key) as path:
        assert path.read_bytes() == CONTENTS[1]
    backend.drop_upload(key)
    assert redis_server.client.keys("lorry:chunk:*") == []
    backend.close()


def test_who_waits_for_changes_is_told_that_some_are_gone(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(redis_server)
    position = backend.load().position
    publish(backend, 0)
    publish(backend, 1)
    redis_server.client.xtrim("lorry:events", maxlen=1, approximate=False)
    with pytest.raises(RevisionCompacted):
        backend.changes(position)
    monkeypatch.setattr(backend.catalogue, "changes", lambda _: [])  # they go right afterwards
    with pytest.raises(RevisionCompacted):
        backend.wait_for_changes(position)
    backend.close()


def test_a_full_redis_is_one_that_is_there(redis_server: RedisServer) -> None:
    backend = opened(redis_server)
    key = begin(backend, 0)
    redis_server.client.config_set("maxmemory", "1mb")
    backend.link._away = True  # until this probe
    with pytest.raises(StoreFull):
        backend.append(key, len(CONTENTS[0]), b"more")
    assert backend.find_upload(key) is not None
    backend.close()


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("maxmemory-policy", "allkeys-lru", "noeviction"),
        ("appendonly", "no", "appendonly"),
        ("appendfsync", "everysec", "appendfsync"),
    ],
)
def test_a_redis_that_would_lose_adapters_is_refused_or_warned_of(
    redis_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
    setting: str,
    value: str,
    problem: str,
) -> None:
    redis_server.client.config_set(setting, value)
    if setting == "maxmemory-policy":
        with pytest.raises(ValueError, match=problem):
            opened(redis_server)
    else:
        with caplog.at_level(logging.WARNING):
            opened(redis_server).close()
        assert problem in caplog.text


def test_a_redis_of_another_base_model_or_none_is_refused(redis_server: RedisServer) -> None:
    with pytest.raises(ValueError, match="not the Redis of a store"):
        opened(redis_server, None)
    opened(redis_server).close()
    opened(redis_server, None).close()
    with pytest.raises(ValueError, match="another base model"):
        opened(redis_server, b"other" * 4)


def test_tls_and_a_user_who_may_do_no_more_than_needed(tmp_path: Path) -> None:
    certs.make(tmp_path / "certs", "redis", "stranger", host=("127.0.0.1",))
    files = tmp_path / "certs" / "redis"
    password = tmp_path / "password"
    password.write_text("open sesame\n")
    with running_redis(
        tmp_path / "redis",
        *["--tls-port", "0", "--tls-cert-file", str(files / "tls.crt")],
        *["--tls-key-file", str(files / "tls.key"), "--tls-ca-cert-file", str(files / "ca.crt")],
        *["--tls-auth-clients", "no"],
    ) as server:
        client = server.client
        client.execute_command("ACL", "SETUSER", "lorry", "on", ">open sesame", *ACL.split())
        port = server.serve_tls()
        address = RedisAddress.parse(
            f"rediss://lorry@127.0.0.1:{port}", password_file=password, ca_file=files / "ca.crt"
        )
        backend = RedisBackend(address, model_digest=MODEL, grace_ms=0)
        publish(backend, 0)
        assert backend.wait_for_changes(backend.load().position) == []
        backend.lease([adapter(0).published])
        backend.drop_expired(0.0, busy=())
        backend.close()
        for wrong in (
            replace(address, password="closed"),
            replace(address, ca_file=None),
            replace(address, tls=False),
        ):
            with pytest.raises(ValueError, match="cannot be used") as caught:
                RedisBackend(wrong, model_digest=MODEL)
            assert "sesame" not in str(caught.value)
            assert "closed" not in str(caught.value)
