"""The three services over a real server: tenants, names, pages, statuses."""

import asyncio
import json
from base64 import urlsafe_b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from lorry.kernels.page_layout import MODULES
from lorry.rpc.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    EtagMismatch,
    InvalidRequest,
    UploadNotFound,
    VersionNotFound,
)
from lorry.rpc.identity import Caller, Role
from lorry.rpc.names import AdapterName
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.adapter_store import Client, RunningStore, running_store
from tests.support.adapters import lora_config, lora_files, lora_tensors
from tests.support.waiting import until

CONFIG = lora_config(r=4)
TOKENS = {
    sha256(token.encode()).digest(): Caller(tenant, frozenset({role}))
    for token, tenant, role in [
        ("acme", "acme", Role.MANAGE),
        ("umbrella", "umbrella", Role.MANAGE),
        ("router", "infra", Role.ROUTER),
        ("worker", "infra", Role.WORKER),
        ("admin", "infra", Role.ADMIN),
    ]
}


def weights(seed: int = 0, config: dict[str, Any] = CONFIG) -> bytes:
    return lora_files(config, lora_tensors(config, seed=seed))[1]


async def test_an_uploaded_adapter_is_published_with_what_was_found_in_it(client: Client) -> None:
    config = lora_config(r=4, targets=MODULES, rank_pattern={"q_proj": 12})
    content = weights(config=config)
    published = await client.push("sql", config, content, labels={"team": "data"})
    adapter = await client.get("adapters/sql")
    assert adapter == published
    assert adapter.name == "tenants/default/adapters/sql"
    assert adapter.method == pb.Adapter.METHOD_LORA
    assert adapter.version == adapter.published.digest
    assert adapter.published.max_rank == 12
    assert tuple(adapter.published.modules) == MODULES
    assert adapter.published.state == pb.AdapterVersion.STATE_READY
    assert 0 < adapter.published.weights_bytes < len(content)
    assert dict(adapter.labels) == {"team": "data"}


async def test_the_version_depends_on_the_content_and_not_on_how_it_was_written(
    client: Client,
) -> None:
    tensors = lora_tensors(CONFIG)
    turned = dict(reversed(tensors.items()))
    first = await client.push("one", CONFIG, lora_files(CONFIG, tensors)[1])
    second = await client.push("two", CONFIG | {"lora_dropout": 0.1}, lora_files(CONFIG, turned)[1])
    third = await client.push("three", CONFIG | {"lora_alpha": 1}, lora_files(CONFIG, tensors)[1])
    fourth = await client.push("four", CONFIG, weights(seed=1))
    assert first.version == second.version
    assert len({first.version, third.version, fourth.version}) == 3


async def test_a_config_is_refused_before_any_weights_travel(client: Client) -> None:
    with pytest.raises(AdapterInvalid, match="use_dora"):
        await client.begin("sql", CONFIG | {"use_dora": True}, weights())


async def test_weights_that_do_not_fit_the_config_are_refused_naming_the_tensor(
    client: Client,
) -> None:
    tensors = lora_tensors(CONFIG)
    name = next(iter(tensors))
    del tensors[name]
    with pytest.raises(AdapterInvalid) as caught:
        await client.push("sql", CONFIG, lora_files(CONFIG, tensors)[1])
    assert caught.value.violations[0].field == name
    with pytest.raises(AdapterNotFound):
        await client.get("adapters/sql")


async def test_a_new_version_needs_the_etag_of_what_it_replaces(client: Client) -> None:
    first = await client.push("sql", CONFIG, weights())
    with pytest.raises(AdapterExists):
        await client.push("sql", CONFIG, weights(1))
    with pytest.raises(EtagMismatch):
        await client.push("sql", CONFIG, weights(1), etag="stale")
    with pytest.raises(AdapterNotFound):
        await client.push("other", CONFIG, weights(1), etag=first.etag)
    second = await client.push("sql", CONFIG, weights(1), etag=first.etag)
    assert second.etag != first.etag
    assert second.version != first.version
    assert second.create_time == first.create_time


async def test_of_two_uploads_that_replace_the_same_version_one_is_published(
    client: Client,
) -> None:
    first = await client.push("sql", CONFIG, weights())
    uploads = [await client.begin("sql", CONFIG, weights(seed), etag=first.etag) for seed in (1, 2)]
    results = await asyncio.gather(
        *(client.send(upload, weights(seed)) for upload, seed in zip(uploads, (1, 2), strict=True)),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == [
        "EtagMismatch",
        "UploadAdapterResponse",
    ]


async def update(client: Client, adapter: pb.Adapter, *paths: str) -> pb.Adapter:
    request = pb.UpdateAdapterRequest(adapter=adapter, update_mask=FieldMask(paths=paths))
    response = await client.call(client.adapters.UpdateAdapter, request)
    updated: pb.Adapter = response.adapter
    return updated


async def test_an_update_changes_what_its_mask_names(client: Client) -> None:
    adapter = await client.push("sql", CONFIG, weights(), labels={"team": "data"})
    wanted = pb.Adapter(
        name="adapters/sql", etag=adapter.etag, description="new", labels={"team": "x"}
    )
    updated = await update(client, wanted, "description")
    assert (updated.description, dict(updated.labels)) == ("new", {"team": "data"})
    assert updated.etag != adapter.etag
    with pytest.raises(EtagMismatch):
        await update(client, wanted, "labels")


async def test_a_name_is_rolled_back_by_version(client: Client) -> None:
    first = await client.push("sql", CONFIG, weights())
    second = await client.push("sql", CONFIG, weights(1), etag=first.etag)
    rolled_back = await update(
        client, pb.Adapter(name=second.name, etag=second.etag, version=first.version), "version"
    )
    assert rolled_back.published == first.published
    response = await client.call(
        client.adapters.ListAdapterVersions,
        pb.ListAdapterVersionsRequest(name="adapters/sql", page_size=1),
    )
    assert [version.digest for version in response.versions] == [second.version]
    response = await client.call(
        client.adapters.ListAdapterVersions,
        pb.ListAdapterVersionsRequest(name="adapters/sql", page_token=response.next_page_token),
    )
    assert [version.digest for version in response.versions] == [first.version]
    assert not response.next_page_token
    with pytest.raises(VersionNotFound):
        await update(
            client, pb.Adapter(name=first.name, etag=rolled_back.etag, version=b"x" * 32), "version"
        )


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({}, []),
        ({}, ["name"]),
        ({}, ["etag", "labels"]),
        ({"etag": ""}, ["labels"]),
        ({"labels": {"": "x"}}, ["labels"]),
        ({"labels": {"k" * 64: "x"}}, ["labels"]),
        ({"labels": {"k": "x" * 64}}, ["labels"]),
        ({"labels": {str(i): "" for i in range(17)}}, ["labels"]),
        ({"description": "x" * 1025}, ["description"]),
        ({"version": b"short"}, ["version"]),
        ({"name": "sql"}, ["labels"]),
        ({"name": "adapters/../x"}, ["labels"]),
    ],
)
async def test_a_malformed_update_is_refused(
    client: Client, fields: dict[str, Any], paths: list[str]
) -> None:
    adapter = await client.push("sql", CONFIG, weights())
    wanted: dict[str, Any] = {"name": "adapters/sql", "etag": adapter.etag, **fields}
    with pytest.raises(InvalidRequest):
        await update(client, pb.Adapter(**wanted), *paths)
    assert await client.get("adapters/sql") == adapter


async def delete(client: Client, name: str, **options: Any) -> None:
    request = pb.DeleteAdapterRequest(name=name, **options)
    await client.call(client.adapters.DeleteAdapter, request)


async def test_a_deleted_adapter_is_gone_and_its_name_is_free(client: Client) -> None:
    first = await client.push("sql", CONFIG, weights())
    with pytest.raises(EtagMismatch):
        await delete(client, "adapters/sql", etag="stale")
    await delete(client, "adapters/sql", etag=first.etag)
    with pytest.raises(AdapterNotFound):
        await client.get("adapters/sql")
    with pytest.raises(AdapterNotFound):
        await delete(client, "adapters/sql")
    await delete(client, "adapters/sql", allow_missing=True)
    again = await client.push("sql", CONFIG, weights())
    assert again.etag != first.etag


async def listed(client: Client, **fields: Any) -> pb.ListAdaptersResponse:
    response: pb.ListAdaptersResponse = await client.call(
        client.adapters.ListAdapters, pb.ListAdaptersRequest(**fields)
    )
    return response


async def test_adapters_are_listed_by_name_in_pages(client: Client) -> None:
    content = weights()
    for adapter_id in ("c", "a", "b", "aa"):
        await client.push(adapter_id, CONFIG, content)
    names, token = [], ""
    while True:
        page = await listed(client, page_size=3, page_token=token)
        names += [adapter.name.rpartition("/")[2] for adapter in page.adapters]
        assert page.revision == 4
        assert page.store_id
        token = page.next_page_token
        if not token:
            break
    assert names == ["a", "aa", "b", "c"]


async def test_a_page_token_is_good_for_its_filter_only(client: Client) -> None:
    content = weights()
    for adapter_id in ("a", "b"):
        await client.push(adapter_id, CONFIG, content, labels={"team": "x"})
    page = await listed(client, page_size=1, filter='labels.team="x"')
    assert page.next_page_token
    nested = urlsafe_b64encode(b"[" * 10_000).decode()
    for token in (page.next_page_token, "nonsense", "bm9uc2Vuc2U=", nested):
        with pytest.raises(InvalidRequest, match="page_token"):
            await listed(client, page_size=1, page_token=token)
    with pytest.raises(InvalidRequest, match="page_size"):
        await listed(client, page_size=-1)


async def test_a_list_is_filtered_by_labels(client: Client) -> None:
    content = weights()
    await client.push("a", CONFIG, content, labels={"team": "x", "stage": "live"})
    await client.push("b", CONFIG, content, labels={"team": "x"})
    for text, expected in [
        ("", 2),
        ('labels.team="x"', 2),
        ('labels.team="x" AND labels.stage="live"', 1),
        ('method=LORA AND labels.stage="live"', 1),
        ('labels.team="y"', 0),
        ("method=LORA", 2),
    ]:
        assert len((await listed(client, filter=text)).adapters) == expected
    wrong = ["team=x", "method=IA3", 'labels.team="x" AND', 'labels.team="x"method=LORA']
    for text in (*wrong, " AND ".join(['labels.team="x"'] * 1000)):
        with pytest.raises(InvalidRequest, match="filter"):
            await listed(client, filter=text)


async def test_a_page_of_large_adapters_stays_under_the_limit_of_a_message(
    running: RunningStore,
) -> None:
    client, content = running.client, weights()
    labels = {f"{i:02}{'k' * 61}": "v" * 63 for i in range(16)}
    adapter = await client.push("a", CONFIG, content, labels=labels)
    adapter = await update(
        client,
        pb.Adapter(name=adapter.name, etag=adapter.etag, description="d" * 1024),
        "description",
    )
    for i in range(400):
        await copy_adapter(running, adapter, f"copy-{i}")
    names, token = [], ""
    while True:
        page = await listed(client, page_size=1000, page_token=token)
        assert page.ByteSize() < 2 << 20
        names += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert len(names) == len(set(names)) == 401


async def copy_adapter(running: RunningStore, adapter: pb.Adapter, adapter_id: str) -> None:
    """Another name for a version, without uploading it again."""
    catalogue = running.store.catalogue
    original = catalogue.get(AdapterName.parse(adapter.name, tenant=""))
    assert original is not None
    name = AdapterName("default", adapter_id)
    await catalogue.change(name, lambda _: replace(original, name=name))


async def test_another_tenants_adapter_is_like_one_that_does_not_exist(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path, tokens=TOKENS) as running,
        running.client_with("acme") as acme,
        running.client_with("umbrella") as umbrella,
    ):
        adapter = await acme.push("sql", CONFIG, weights())
        assert adapter.name == "tenants/acme/adapters/sql"
        for name in (adapter.name, "adapters/sql", "tenants/acme/adapters/absent"):
            with pytest.raises(AdapterNotFound) as unknown:
                await umbrella.get(name)
            assert name.rpartition("/")[2] in str(unknown.value)
        with pytest.raises(AdapterNotFound):
            await delete(umbrella, adapter.name)
        await delete(umbrella, adapter.name, allow_missing=True)
        with pytest.raises(AdapterNotFound):
            await update(umbrella, pb.Adapter(name=adapter.name, etag=adapter.etag), "labels")
        assert not (await listed(umbrella)).adapters
        await umbrella.push("sql", CONFIG, weights(1))
        assert await acme.get(adapter.name) == adapter


async def test_routers_and_admins_see_all_tenants(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path, tokens=TOKENS) as running,
        running.client_with("acme") as acme,
        running.client_with("router") as router,
        running.client_with("admin") as admin,
    ):
        adapter = await acme.push("sql", CONFIG, weights())
        for caller in (router, admin):
            assert await caller.get(adapter.name) == adapter
            assert list((await listed(caller)).adapters) == [adapter]
        await delete(admin, adapter.name)


async def test_an_upload_belongs_to_its_tenant(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path, tokens=TOKENS) as running,
        running.client_with("acme") as acme,
        running.client_with("umbrella") as umbrella,
        running.client_with("admin") as admin,
    ):
        upload_id = await acme.begin("sql", CONFIG, weights())
        for stranger in (umbrella, admin):
            with pytest.raises(UploadNotFound):
                await stranger.call(
                    stranger.adapters.GetUpload, pb.GetUploadRequest(upload_id=upload_id)
                )
            with pytest.raises(UploadNotFound):
                await stranger.send(upload_id, weights())
        await acme.send(upload_id, weights())


async def test_equal_content_of_two_tenants_is_kept_once(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path, tokens=TOKENS) as running,
        running.client_with("acme") as acme,
        running.client_with("umbrella") as umbrella,
    ):
        first = await acme.push("sql", CONFIG, weights())
        second = await umbrella.push("other", CONFIG, weights())
        assert first.version == second.version
        versions = running.backend_dir / "versions"
        await delete(acme, first.name)
        await running.store.sweep()
        assert len(list(versions.iterdir())) == 1
        await delete(umbrella, second.name)
        await until(lambda: not list(versions.iterdir()))


async def test_a_version_tells_its_tenant_from_which_files_it_was_uploaded(client: Client) -> None:
    adapter = await client.push("sql", CONFIG, weights())
    assert adapter.published.weights_sha256 == sha256(weights()).digest()
    assert adapter.published.config_sha256 == sha256(json.dumps(CONFIG).encode()).digest()
