"""Quotas of tenants, and that no answer tells one tenant of another's content."""

import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from lorry.adapter_store.file_backend import FileBackend
from lorry.adapter_store.limits import Limits, TenantLimits, read_tenant_limits
from lorry.adapter_store.peft_config import resolve
from lorry.adapter_store.records import Content, UploadRecord
from lorry.rpc.errors import InvalidRequest, LorryError, TenantLimit
from lorry.rpc.identity import Caller, Role
from lorry.rpc.names import AdapterName
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.adapter_store import Client, RunningStore, running_store
from tests.support.adapters import TINY, lora_config, lora_files, lora_tensors

CONFIG = lora_config(r=4)
WEIGHTS = lora_files(CONFIG, lora_tensors(CONFIG))[1]
TENANTS = ("acme", "umbrella")
TOKENS = {
    sha256(tenant.encode()).digest(): Caller(tenant, frozenset({Role.MANAGE})) for tenant in TENANTS
}
TWO_FIT = Limits(tenant=TenantLimits(bytes=2 * len(WEIGHTS)))
VERSION_OF_NOBODY = b"v" * 32
UPLOAD = UploadRecord(
    key="",
    name=AdapterName("acme", "sql"),
    spec=resolve(CONFIG, TINY),
    weights_bytes=6,
    weights_sha256=b"s" * 32,
    labels={},
    expected_etag="",
    create_time_ns=1,
)
HOSTILE_NAMES = [
    "tenants/../adapters/a",
    "adapters/../../a",
    "adapters/a/b",
    "adapters/a\0b",
    "adapters/a\n",
    "adapters/\u202ea",
    "adapters/\u0430",  # a Cyrillic letter that looks like a
    "adapters/a\u0301",
    "adapters/\uff41",
    "adapters/A",
    "adapters/a.",
    "tenants/acme\u200b/adapters/a",
]


def test_what_an_entry_leaves_out_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    path.write_text(json.dumps({"tenants": {"acme": {"rank": 8, "adapters": 0}}}))
    default = TenantLimits(uploads=3, bytes=100)
    limits = Limits(tenant=default, tenants=read_tenant_limits(path, default))
    assert limits.of("acme") == TenantLimits(uploads=3, adapters=0, bytes=100, rank=8)
    assert limits.of("umbrella") == default


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[", "Expecting value"),
        ("[]", "list"),
        ('{"tenants": {"No Id": {}}}', "No Id"),
        ('{"tenants": {"acme": {"gold": 1}}}', "acme.gold"),
        ('{"tenants": {"acme": {"rank": -1}}}', "acme.rank"),
        ('{"tenants": {"acme": {"rank": true}}}', "True"),
        ('{"tenants": {"acme": 7}}', "int"),
    ],
)
def test_a_malformed_limits_file_is_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "limits.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=problem) as caught:
        read_tenant_limits(path, TenantLimits())
    assert "limits.json" in str(caught.value)


async def test_each_tenant_has_its_own_limits(tmp_path: Path) -> None:
    limits = Limits(tenant=TenantLimits(rank=2), tenants={"acme": TenantLimits(rank=4)})
    async with (
        running_store(tmp_path, tokens=TOKENS, limits=limits) as running,
        running.client_with("acme") as acme,
        running.client_with("umbrella") as umbrella,
    ):
        await acme.push("sql", CONFIG, WEIGHTS)
        with pytest.raises(TenantLimit) as caught:
            await umbrella.begin("sql", CONFIG, WEIGHTS)
        assert caught.value.metadata == {"limit": "2", "wanted": "4", "what": "rank"}


async def test_what_a_tenant_uses_is_counted_through_every_change(tmp_path: Path) -> None:
    async with running_store(tmp_path, limits=Limits(versions_kept=2)) as running:
        client, catalogue = running.client, running.store.catalogue
        etag = ""
        for seed in range(4):
            content = lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))[1]
            etag = (await client.push("sql", CONFIG, content, etag=etag)).etag
        weights_bytes = (await client.get("adapters/sql")).published.weights_bytes
        assert catalogue.adapters_of("default") == 1
        assert catalogue.bytes_of("default") == 2 * weights_bytes
    async with running_store(tmp_path) as running:
        catalogue = running.store.catalogue
        assert catalogue.bytes_of("default") == 2 * weights_bytes
        request = pb.DeleteAdapterRequest(name="adapters/sql")
        await running.client.call(running.client.adapters.DeleteAdapter, request)
        assert (catalogue.adapters_of("default"), catalogue.bytes_of("default")) == (0, 0)


async def test_all_that_a_tenant_can_see_is_the_same_whatever_another_has(tmp_path: Path) -> None:
    """One store holds the same content of another tenant already, the other store does not."""
    seen = []
    for directory, held in ((tmp_path / "shared", True), (tmp_path / "alone", False)):
        async with (
            running_store(directory, tokens=TOKENS, limits=TWO_FIT) as running,
            running.client_with("acme") as acme,
            running.client_with("umbrella") as umbrella,
        ):
            if held:
                await umbrella.push("sql", CONFIG, WEIGHTS)
            seen.append([answer async for answer in everything_seen(acme)])
    assert seen[0] == seen[1]
    assert "VersionNotFound" in str(seen)
    assert "TenantLimit" in str(seen)


async def everything_seen(client: Client) -> AsyncIterator[str]:
    """Answers and errors of a tenant's calls, without what is random or a time."""
    half, adapters = len(WEIGHTS) // 2, client.adapters
    upload_id = await client.begin("mine", CONFIG, WEIGHTS)
    yield await seen(client.send(upload_id, WEIGHTS[:half]))
    yield str((await client.upload(upload_id)).received_bytes)
    yield await seen(client.begin("other", CONFIG, WEIGHTS, num_bytes=2 * len(WEIGHTS)))
    yield await seen(client.send(upload_id, WEIGHTS, start=half))
    adapter = await client.get("adapters/mine")
    for version in (VERSION_OF_NOBODY, sha256(WEIGHTS).digest()):
        request = pb.UpdateAdapterRequest(
            adapter=pb.Adapter(name=adapter.name, etag=adapter.etag, version=version),
            update_mask=FieldMask(paths=["version"]),
        )
        yield await seen(client.call(adapters.UpdateAdapter, request))
    for name in ("tenants/umbrella/adapters/sql", "tenants/umbrella/adapters/absent"):
        yield await seen(client.get(name))
        history = pb.ListAdapterVersionsRequest(name=name)
        yield await seen(client.call(adapters.ListAdapterVersions, history))
        yield await seen(client.call(adapters.DeleteAdapter, pb.DeleteAdapterRequest(name=name)))
    yield await seen(client.begin("sql", CONFIG, WEIGHTS, etag="guess"))
    yield await seen(client.push("wrong", CONFIG, WEIGHTS, sha256=b"x" * 32))
    listing = await client.call(adapters.ListAdapters, pb.ListAdaptersRequest())
    yield str([adapter.name for adapter in listing.adapters])


async def seen(call: Coroutine[Any, Any, Any]) -> str:
    try:
        answer = await call
    except LorryError as error:
        return f"{type(error).__name__} {error} {error.metadata}"
    adapter = getattr(answer, "adapter", answer)
    return f"{adapter.name} {adapter.version.hex()} {adapter.published.weights_bytes}"


async def test_a_tenants_list_looks_at_no_adapter_of_another(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path, tokens=TOKENS) as running,
        running.client_with("acme") as acme,
        running.client_with("umbrella") as umbrella,
    ):
        for client, adapter_id in ((acme, "a"), (umbrella, "b"), (umbrella, "c")):
            await client.push(adapter_id, CONFIG, WEIGHTS, labels={"team": "x"})
        await acme.push("d", CONFIG, WEIGHTS, labels={"team": "x", "stage": "live"})
        after = running.store.catalogue.after
        found = {
            (tenant, labels): [a.name.adapter for a in after(None, tenant=tenant, labels=labels)]
            for tenant in ("acme", "umbrella", "nobody", None)
            for labels in ((), (("team", "x"),), (("team", "x"), ("stage", "live")))
        }
        assert [*found.values()] == [
            *(["a", "d"], ["a", "d"], ["d"]),
            *(["b", "c"], ["b", "c"], []),
            *([], [], []),
            *(["a", "d", "b", "c"], ["a", "d", "b", "c"], ["d"]),
        ]
        request = pb.DeleteAdapterRequest(name="adapters/d")
        await acme.call(acme.adapters.DeleteAdapter, request)
        assert not list(after(None, labels=[("stage", "live")]))


def test_keeping_a_content_takes_the_same_steps_whether_or_not_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its time tells nothing: what takes long is to have bytes reach the disk."""
    backend = FileBackend(tmp_path, model_digest=b"m" * 32)
    steps: list[list[str]] = []
    for name in ("fsync", "link", "mkdir"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name), steps))
    content = Content(resolve(CONFIG, TINY), 7)
    records = [replace(UPLOAD, key=digit * 64) for digit in "01"]
    for record in records:
        backend.create_upload(record)
    for record in records:
        steps.append([])
        backend.keep(record.key, b"d" * 32, content)
    backend.close()
    assert steps[0] == steps[1]
    assert steps[0].count("fsync") >= 3


def counted(name: str, call: Callable[..., Any], steps: list[list[str]]) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **options: Any) -> Any:
        if steps:
            steps[-1].append(name)
        return call(*arguments, **options)

    return wrapper


async def test_names_with_tricks_are_no_names(running: RunningStore) -> None:
    client = running.client
    for name in HOSTILE_NAMES:
        with pytest.raises(InvalidRequest):
            await client.get(name)
        with pytest.raises(InvalidRequest):
            await client.begin(name.removeprefix("adapters/"), CONFIG, WEIGHTS)
