"""Every method of the real services, called with no token, a wrong one, and one of another role."""

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from lorry.client import Client, Request
from lorry.rpc.errors import PermissionDenied, Unauthenticated
from lorry.rpc.identity import METHOD_ROLES, Role
from lorry.rpc.status import from_rpc
from tests.support.processes import Stack, ready
from tests.support.services import METHODS

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Services whose tokens are the names of the roles."""
    directory = tmp_path_factory.mktemp("stack")
    stack = Stack(directory, *token_options(directory, Role.WORKER))
    stack.store.options += token_options(directory, None)
    stack.router.options += token_options(directory, Role.ROUTER)
    try:
        await stack.start()
        await ready(stack.router.address)
        yield stack
    finally:
        await stack.stop()


def token_options(directory: Path, own: Role | None) -> tuple[str, ...]:
    tokens = directory / "tokens.json"
    entries = [
        {
            "sha256": hashlib.sha256(role.value.encode()).hexdigest(),
            "tenant": "acme",
            "role": role.value,
        }
        for role in Role
    ]
    tokens.write_text(json.dumps({"tokens": entries}))
    if own is None:
        return ("--tokens", str(tokens))
    token = directory / f"{own.value}.token"
    token.write_text(own.value)
    return ("--tokens", str(tokens), "--token-file", str(token))


def address_of(stack: Stack, path: str) -> str:
    if "InferenceService" in path:
        return stack.router.address
    return stack.worker.address if "/lorry.v1.Worker" in path else stack.store.address


async def failure(stack: Stack, path: str, token: str | None) -> Exception:
    async with grpc.aio.insecure_channel(address_of(stack, path)) as channel:
        with pytest.raises(grpc.RpcError) as error:
            await METHODS[path].call(channel, token)
    return from_rpc(error.value)


@pytest.mark.parametrize("path", METHODS)
async def test_a_caller_without_a_valid_token_is_not_served(stack: Stack, path: str) -> None:
    for token in (None, "guess", "", "infer "):
        assert type(await failure(stack, path, token)) is Unauthenticated, token


@pytest.mark.parametrize("path", METHODS)
async def test_a_role_that_may_not_call_it_is_refused(stack: Stack, path: str) -> None:
    weak = set(Role) - METHOD_ROLES[path] - {Role.ADMIN}
    assert weak
    for role in weak:
        assert type(await failure(stack, path, role.value)) is PermissionDenied, role


async def test_the_right_token_is_served(stack: Stack) -> None:
    request = Request(prompt="lorry>", max_tokens=3, ignore_eos=True)
    async with Client(router=stack.router.address, token="infer") as client:
        assert len((await client.generate(request)).token_ids) == 3
