"""Every method of the real services over mutual TLS: with no token or certificate of a caller, a
wrong one, and one of another role."""

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from lorry.client import Client, Request
from lorry.rpc.channel import Credentials, open_channel
from lorry.rpc.errors import PermissionDenied, Unauthenticated
from lorry.rpc.identity import METHOD_ROLES, Role
from lorry.rpc.status import from_rpc
from tests.support.certificates import certify
from tests.support.processes import Stack, ready
from tests.support.services import METHODS

pytestmark = pytest.mark.asyncio(loop_scope="module")
STRANGER = "stranger"  # whose certificate the authority has signed, and that is all
TENANT = "acme"


class SecureStack(Stack):
    """Tokens are the names of the roles, and certificates have them as their names.

    The worker shows its certificate only; the router, whose own names nobody, a token too.
    """

    def __init__(self, directory: Path) -> None:
        self.secrets = directory / "secrets"
        for role in Role:
            certify(self.secrets, role.value, role, tenant=TENANT)
        for name in (STRANGER, "the-store", "the-router"):
            certify(self.secrets, name)
        super().__init__(directory)
        tokens = directory / "tokens.json"
        tokens.write_text(json.dumps({"tokens": [token_entry(role) for role in Role]}))
        callers = self.secrets / "callers" / "certificates.json"
        token_file = directory / "router.token"
        token_file.write_text(Role.ROUTER.value)
        for service, name in (
            (self.store, "the-store"),
            (self.worker, Role.WORKER.value),
            (self.router, "the-router"),
        ):
            service.options += ("--tls", str(self.secrets / name), "--tls-callers", str(callers))
            service.options += ("--tokens", str(tokens))
        self.router.options += ("--token-file", str(token_file))

    def credentials(self, name: str, token: str | None = None) -> Credentials:
        """Of the certificate of that name, and a token."""
        return Credentials(token=token, tls=self.secrets / name)


def token_entry(role: Role) -> dict[str, str]:
    digest = hashlib.sha256(role.value.encode()).hexdigest()
    return {"sha256": digest, "tenant": TENANT, "role": role.value}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SecureStack]:
    stack = SecureStack(tmp_path_factory.mktemp("stack"))
    try:
        await stack.start()
        await ready(stack.router.address, stack.credentials(STRANGER))
        yield stack
    finally:
        await stack.stop()


def address_of(stack: Stack, path: str) -> str:
    if "InferenceService" in path:
        return stack.router.address
    return stack.worker.address if "/lorry.v1.Worker" in path else stack.store.address


async def failure(stack: SecureStack, path: str, credentials: Credentials) -> Exception:
    async with open_channel(address_of(stack, path), credentials) as channel:
        with pytest.raises(grpc.RpcError) as error:
            await METHODS[path].call(channel)
    return from_rpc(error.value)


@pytest.mark.parametrize("path", METHODS)
async def test_a_caller_without_a_valid_token_is_not_served(stack: SecureStack, path: str) -> None:
    for token in (None, "guess", "infer "):
        credentials = stack.credentials(STRANGER, token)
        assert type(await failure(stack, path, credentials)) is Unauthenticated, token


@pytest.mark.parametrize("path", METHODS)
async def test_a_wrong_token_is_refused_also_beside_a_certificate_that_may_call(
    stack: SecureStack, path: str
) -> None:
    credentials = stack.credentials(Role.ADMIN.value, "guess")
    assert type(await failure(stack, path, credentials)) is Unauthenticated


@pytest.mark.parametrize("path", METHODS)
async def test_a_role_that_may_not_call_it_is_refused(stack: SecureStack, path: str) -> None:
    weak = set(Role) - METHOD_ROLES[path] - {Role.ADMIN}
    assert weak
    for role in weak:
        for credentials in (
            stack.credentials(STRANGER, role.value),
            stack.credentials(role.value),
        ):
            assert type(await failure(stack, path, credentials)) is PermissionDenied, credentials


@pytest.mark.parametrize("service", ["router", "store", "worker"])
async def test_a_client_without_a_certificate_of_the_authority_gets_no_connection(
    stack: SecureStack, service: str, tmp_path: Path
) -> None:
    address = getattr(stack, service).address
    other = certify(tmp_path / "other", "admin", Role.ADMIN)
    authority = stack.secrets / STRANGER / "ca.crt"
    (other / "ca.crt").write_text(authority.read_text())  # so that the server is trusted
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    (nobody / "ca.crt").write_text(authority.read_text())
    path = next(path for path in METHODS if address_of(stack, path) == address)
    channels = [open_channel(address, Credentials(tls=tls)) for tls in (other, nobody)]
    for channel in (*channels, grpc.aio.insecure_channel(address)):
        async with channel:
            with pytest.raises(grpc.RpcError) as error:
                await METHODS[path].call(channel, "admin")
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("name", "token"), [(STRANGER, "infer"), ("infer", None), ("manage", "infer")]
)
async def test_the_right_token_or_certificate_is_served(
    stack: SecureStack, name: str, token: str | None
) -> None:
    request = Request(prompt="lorry>", max_tokens=3, ignore_eos=True)
    address = stack.router.address
    async with Client(router=address, token=token, tls=stack.secrets / name) as client:
        assert len((await client.generate(request)).token_ids) == 3


async def test_an_adapter_is_pushed_and_served_over_tls(stack: SecureStack) -> None:
    directory = Path(__file__).parents[2] / "demo" / "adapters" / "reverse"
    router, store = stack.router.address, stack.store.address
    async with Client(router=router, store=store, tls=stack.secrets / "manage") as operator:
        await operator.adapters.push(directory)
    request = Request(prompt="banana>", adapter="reverse", temperature=0, max_tokens=16)
    async with Client(router=router, store=store, tls=stack.secrets / "infer") as user:
        assert (await user.generate(request)).text == "ananab"
