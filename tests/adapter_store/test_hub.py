"""Imports from a server that speaks the hub's protocol, through the library and a real store."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorry.adapter_store.hub_download import may_pass
from lorry.adapter_store.limits import Limits
from lorry.rpc.errors import (
    AdapterExists,
    AdapterInvalid,
    DeadlineExpired,
    InvalidRequest,
    PermissionDenied,
    StoreUnavailable,
)
from lorry.v1 import store_admin_service_pb2 as pb
from tests.support.adapter_store import HubOptions, RunningStore, running_store
from tests.support.adapters import lora_config, lora_files, lora_tensors
from tests.support.hub_server import COMMIT, HubRepository, serving_hub

CONFIG = lora_config(r=4)
CONFIG_JSON, WEIGHTS = lora_files(CONFIG, lora_tensors(CONFIG))
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def repository(**fields: Any) -> HubRepository:
    files = {
        CONFIG_NAME: CONFIG_JSON.encode(),
        WEIGHTS_NAME: WEIGHTS,
        "adapter_model.bin": b"a pickle",
        "README.md": b"# hello",
    }
    return HubRepository("my-org/sql", files, **fields)


async def bring(
    running: RunningStore,
    source: str = "my-org/sql",
    revision: str = "main",
    *,
    name: str = "adapters/sql",
    replace: bool = False,
) -> Any:
    request = pb.ImportFromHubRequest(
        repository=source, revision=revision, name=name, replace=replace
    )
    return await running.client.call(running.client.admin.ImportFromHub, request)


async def test_a_branch_is_imported_as_the_commit_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = repository()
    with serving_hub(hub) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        async with running_store(
            tmp_path, hub=HubOptions(allow=("other/*", "my-org/*"))
        ) as running:
            brought = await bring(running)
            assert brought.commit == COMMIT
            assert dict(brought.adapter.labels) == {"hub-commit": COMMIT}
            assert brought.adapter == await running.client.get("adapters/sql")
            assert hub.asked == [CONFIG_NAME, WEIGHTS_NAME]
            config = lora_config(r=8)
            hub.files[CONFIG_NAME], hub.files[WEIGHTS_NAME] = (
                content if isinstance(content, bytes) else content.encode()
                for content in lora_files(config, lora_tensors(config))
            )
            with pytest.raises(AdapterExists):
                await bring(running)
            replaced = await bring(running, replace=True)
            assert replaced.adapter.published.max_rank == 8


async def test_only_what_is_allowed_is_asked_for(tmp_path: Path) -> None:
    async with running_store(
        tmp_path, hub=HubOptions(allow=("my-org/s*",), commits_only=True)
    ) as running:
        for source in ("my-org/other", "other/sql", "MY-ORG/sql"):
            with pytest.raises(PermissionDenied, match="--hub-allow"):
                await bring(running, source, COMMIT)
        with pytest.raises(PermissionDenied, match="whole commit"):
            await bring(running, revision="main")
        for source in ("sql", "my-org/../sql", "my-org/sql/x", "my-org/s ql", "https://x/y", ""):
            with pytest.raises(InvalidRequest):
                await bring(running, source, COMMIT)
        for revision in ("", "../main", "a b", "-x"):
            with pytest.raises(InvalidRequest):
                await bring(running, revision=revision)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"announced": {WEIGHTS_NAME: 10**9}}, "more than"),
        ({"announced": {CONFIG_NAME: 10**6}}, "more than"),
        ({"served": {WEIGHTS_NAME: WEIGHTS[:-1] + b"?"}}, "sha256"),
        ({"served": {WEIGHTS_NAME: WEIGHTS + bytes(10 * len(WEIGHTS))}}, "my-org/sql"),
        ({"commit": "f" * 40, "branch": COMMIT}, "the hub answers commit"),
    ],
)
async def test_what_differs_from_what_was_announced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], problem: str
) -> None:
    limits = Limits(max_weights_bytes=2 * len(WEIGHTS))
    with serving_hub(repository(**fields)) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        async with running_store(tmp_path, limits=limits, hub=HubOptions(allow=("*",))) as running:
            revision = COMMIT if "commit" in fields else "main"
            with pytest.raises(AdapterInvalid, match=problem):
                await bring(running, revision=revision)
            assert running.store.catalogue.num_adapters == 0


async def test_a_repository_without_safetensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = repository()
    del hub.files[WEIGHTS_NAME]
    with serving_hub(hub) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        async with running_store(tmp_path, hub=HubOptions(allow=("*",))) as running:
            with pytest.raises(AdapterInvalid, match=f"holds no {WEIGHTS_NAME}"):
                await bring(running)
            assert hub.asked == []


async def test_a_hub_that_is_away_is_no_fault_of_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_hub(repository()) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    async with running_store(tmp_path, hub=HubOptions(allow=("*",))) as running:
        with pytest.raises(StoreUnavailable, match="hub") as caught:
            await bring(running)
        assert caught.value.retry_after_s


@pytest.mark.parametrize(
    ("status", "passes"), [(401, False), (404, False), (408, True), (429, True), (503, True)]
)
def test_only_the_hubs_own_trouble_is_worth_another_attempt(status: int, passes: bool) -> None:
    error = Exception("what the library raises")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    assert may_pass(error) is passes
    assert not may_pass(ValueError("a name"))
    assert not may_pass(OSError(errno.EFBIG, "a file that may not grow"))
    assert not may_pass(None)
    assert may_pass(ConnectionResetError())


async def test_a_hub_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_hub(repository(hang=True)) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        async with running_store(tmp_path, hub=HubOptions(allow=("*",), timeout_s=4)) as running:
            with pytest.raises(DeadlineExpired, match="within 4 s"):
                await bring(running)
