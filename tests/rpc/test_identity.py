import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from lorry.rpc.callers import read_tokens
from lorry.rpc.errors import PermissionDenied, Unauthenticated
from lorry.rpc.identity import (
    LOCAL_CALLER,
    Authenticator,
    Caller,
    Role,
    current_caller,
    is_loopback_peer,
)
from lorry.rpc.status import from_rpc
from tests.support.services import METHODS, serving_all

# Who may call what; admin may call everything.
TABLE: dict[str, set[Role]] = {
    "/lorry.v1.InferenceService/Generate": {Role.INFER},
    "/lorry.v1.InferenceService/StreamGenerate": {Role.INFER},
    "/lorry.v1.AdapterService/GetAdapter": {Role.MANAGE, Role.ROUTER},
    "/lorry.v1.AdapterService/ListAdapters": {Role.MANAGE, Role.ROUTER},
    "/lorry.v1.AdapterService/UpdateAdapter": {Role.MANAGE},
    "/lorry.v1.AdapterService/DeleteAdapter": {Role.MANAGE},
    "/lorry.v1.AdapterService/ListAdapterVersions": {Role.MANAGE},
    "/lorry.v1.AdapterService/CreateUpload": {Role.MANAGE},
    "/lorry.v1.AdapterService/GetUpload": {Role.MANAGE},
    "/lorry.v1.AdapterService/UploadAdapter": {Role.MANAGE},
    "/lorry.v1.CatalogueService/WatchCatalogue": {Role.ROUTER},
    "/lorry.v1.AdapterDataService/FetchAdapter": {Role.WORKER},
    "/lorry.v1.StoreAdminService/PinImage": set(),
    "/lorry.v1.StoreAdminService/UnpinImage": set(),
    "/lorry.v1.StoreAdminService/ListPins": set(),
    "/lorry.v1.StoreAdminService/ListImports": set(),
    "/lorry.v1.StoreAdminService/ImportFromHub": set(),
    "/lorry.v1.WorkerService/Attach": {Role.ROUTER},
    "/lorry.v1.WorkerService/GetWorkerStatus": {Role.ROUTER},
    "/lorry.v1.WorkerAdminService/PinAdapter": set(),
    "/lorry.v1.WorkerAdminService/UnpinAdapter": set(),
    "/lorry.v1.WorkerAdminService/EvictAdapter": set(),
    "/lorry.v1.WorkerAdminService/Drain": set(),
}
TOKENS = {
    hashlib.sha256(role.value.encode()).digest(): Caller(f"tenant-{role.value}", frozenset({role}))
    for role in Role
}


class StrangerContext:
    """A call from another machine."""

    def __init__(self, authorization: str = "") -> None:
        self._metadata = (("authorization", authorization),)

    def peer(self) -> str:
        return "ipv4:10.0.0.1:5000"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """To a server whose tokens are the names of the roles."""
    async with serving_all(Authenticator(lambda: TOKENS)) as (_, channel):
        yield channel


async def failure(path: str, channel: grpc.aio.Channel, token: str | None) -> Exception:
    with pytest.raises(grpc.RpcError) as error:
        await METHODS[path].call(channel, token)
    return from_rpc(error.value)


def test_every_method_of_every_service_has_a_row() -> None:
    assert set(METHODS) == set(TABLE)


@pytest.mark.parametrize("path", TABLE)
async def test_a_method_serves_the_roles_of_its_row_and_no_other(
    path: str, channel: grpc.aio.Channel
) -> None:
    for role in Role:
        if role in TABLE[path] | {Role.ADMIN}:
            assert len(await METHODS[path].call(channel, role.value)) == 1
        else:
            assert isinstance(await failure(path, channel, role.value), PermissionDenied)


@pytest.mark.parametrize("path", TABLE)
async def test_no_method_serves_a_caller_without_a_valid_token(
    path: str, channel: grpc.aio.Channel
) -> None:
    for token in (None, "guess"):
        assert isinstance(await failure(path, channel, token), Unauthenticated)


async def test_only_the_bearer_scheme_is_accepted(channel: grpc.aio.Channel) -> None:
    generate: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
        "/lorry.v1.InferenceService/Generate"
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await generate(b"", metadata=(("authorization", "Basic infer"),))
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_method_without_a_row_serves_nobody() -> None:
    authenticator = Authenticator(lambda: TOKENS)
    with pytest.raises(PermissionDenied):
        authenticator.admit("/lorry.v1.InferenceService/Other", StrangerContext("Bearer admin"))


async def test_concurrent_calls_see_their_own_caller() -> None:
    seen: list[Caller] = []
    paths = [f"/lorry.v1.{each}" for each in ("InferenceService/Generate", "WorkerService/Attach")]
    async with serving_all(
        Authenticator(lambda: TOKENS), hook=lambda: seen.append(current_caller())
    ) as (
        _,
        channel,
    ):
        await asyncio.gather(
            *(METHODS[paths[0]].call(channel, "infer") for _ in range(10)),
            *(METHODS[paths[1]].call(channel, "router") for _ in range(10)),
        )
    tenants = sorted(caller.tenant for caller in seen)
    assert tenants == ["tenant-infer"] * 10 + ["tenant-router"] * 10


async def test_without_a_token_file_callers_of_this_machine_may_do_everything() -> None:
    seen: list[Caller] = []
    async with serving_all(Authenticator(), hook=lambda: seen.append(current_caller())) as (
        _,
        channel,
    ):
        for method in METHODS.values():
            await method.call(channel)
    assert set(seen) == {LOCAL_CALLER}
    assert Caller("default", frozenset(Role)) == LOCAL_CALLER


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:5000", True),
        ("ipv4:127.9.9.9:5000", True),
        ("ipv6:[::1]:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("unix:/run/lorry.sock", True),
        ("ipv4:10.0.0.1:5000", False),
        ("ipv4:10.127.0.1:5000", False),
        ("ipv6:[::2]:5000", False),
        ("ipv6:[::1234]:5000", False),
        ("", False),
    ],
)
def test_a_peer_is_local_only_on_loopback_or_a_unix_socket(peer: str, local: bool) -> None:
    assert is_loopback_peer(peer) is local


def test_without_a_token_file_strangers_are_refused_unless_insecure() -> None:
    stranger = StrangerContext()
    with pytest.raises(Unauthenticated):
        Authenticator().admit("/lorry.v1.InferenceService/Generate", stranger)
    admitted = Authenticator(insecure=True).admit("/lorry.v1.InferenceService/Generate", stranger)
    assert admitted == LOCAL_CALLER


def test_a_token_file_names_its_callers(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    path = write_tokens(tmp_path, {"sha256": digest, "tenant": "acme", "role": "infer"})
    assert read_tokens(path) == {bytes.fromhex(digest): Caller("acme", frozenset({Role.INFER}))}


GOOD = {"sha256": "ab" * 32, "tenant": "acme", "role": "infer"}


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "role": "king"},
        {**GOOD, "tenant": "Not An Id"},
        {**GOOD, "sha256": "secret"},
        {**GOOD, "sha256": "ab"},
        {"sha256": "ab" * 32, "tenant": "acme"},
        "acme",
    ],
    ids=str,
)
def test_a_malformed_token_file_is_refused_by_name(tmp_path: Path, entry: object) -> None:
    with pytest.raises(ValueError, match=r"tokens\.json"):
        read_tokens(write_tokens(tmp_path, entry))


def test_a_missing_token_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        read_tokens(tmp_path / "nowhere.json")


def write_tokens(directory: Path, *entries: object) -> Path:
    path = directory / "tokens.json"
    path.write_text(json.dumps({"tokens": entries}))
    return path
