"""TLS of servers and channels: who is refused, and certificates that change under load."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry, Counter

from lorry.client.secrets.certificates import renew_certificates
from lorry.client.secrets.directory import SecretsDirectory
from lorry.rpc.callers import read_certificates
from lorry.rpc.channel import Credentials, open_channel
from lorry.rpc.errors import LorryError, PermissionDenied, Unauthenticated
from lorry.rpc.identity import LOCAL_CALLER, Authenticator, Role
from lorry.rpc.metrics_server import serving_metrics
from lorry.rpc.renewed_channel import RenewedChannel
from lorry.rpc.server import Server
from lorry.rpc.status import from_rpc
from lorry.rpc.tls import AUTHORITIES, CERTIFICATE, KEY, ClientTls, ServerTls
from tests.rpc.test_identity import TABLE
from tests.support.certificates import certify, certify_again
from tests.support.services import METHODS, serving_all

GENERATE = METHODS["/lorry.v1.InferenceService/Generate"]
ATTACH = METHODS["/lorry.v1.WorkerService/Attach"]


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A server's certificate, one of each role, and one that names nobody."""
    secrets = tmp_path / "secrets"
    for role in Role:
        certify(secrets, role.value, role)
    for name in ("server", "stranger"):
        certify(secrets, name)
    return secrets


@asynccontextmanager
async def guarded(secrets: Path) -> AsyncIterator[Server]:
    callers = read_certificates(secrets / "callers" / "certificates.json")
    tls = ServerTls(secrets / "server", mutual=True)
    credentials = Credentials(tls=secrets / "infer")
    authenticator = Authenticator(None, lambda: callers)
    async with serving_all(authenticator, tls=tls, credentials=credentials) as (server, _):
        yield server


async def failure(
    server: Server, tls: Path, path: str, server_name: str | None = None
) -> LorryError:
    address = f"127.0.0.1:{server.port}"
    async with open_channel(address, Credentials(tls=tls), server_name=server_name) as channel:
        with pytest.raises(grpc.RpcError) as error:
            await METHODS[path].call(channel)
    return from_rpc(error.value)


async def generate(server: Server, tls: Path) -> None:
    async with open_channel(f"127.0.0.1:{server.port}", Credentials(tls=tls)) as channel:
        await GENERATE.call(channel)


async def test_every_method_serves_the_certificates_of_its_roles_and_no_other(
    secrets: Path,
) -> None:
    async with guarded(secrets) as server:
        address = f"127.0.0.1:{server.port}"
        for role in Role:
            async with open_channel(address, Credentials(tls=secrets / role.value)) as channel:
                for path, roles in TABLE.items():
                    if role in roles | {Role.ADMIN}:
                        assert len(await METHODS[path].call(channel)) == 1
                    else:
                        with pytest.raises(grpc.RpcError) as error:
                            await METHODS[path].call(channel)
                        assert isinstance(from_rpc(error.value), PermissionDenied), (path, role)


async def test_a_certificate_that_names_nobody_is_refused_by_its_name(secrets: Path) -> None:
    async with guarded(secrets) as server:
        for path in TABLE:
            error = await failure(server, secrets / "stranger", path)
            assert isinstance(error, Unauthenticated)
            assert "URI:spiffe://lorry/stranger" in str(error)


async def test_the_name_of_a_host_is_no_uri(secrets: Path) -> None:
    """A host that is called like a caller's URI does not make its certificate that caller's."""
    callers = {"URI:localhost": LOCAL_CALLER}
    tls = ServerTls(secrets / "server", mutual=True)
    credentials = Credentials(tls=secrets / "stranger")
    authenticator = Authenticator(None, lambda: callers)
    async with serving_all(authenticator, tls=tls, credentials=credentials) as (_, channel):
        with pytest.raises(grpc.RpcError) as error:
            await GENERATE.call(channel)
        assert isinstance(from_rpc(error.value), Unauthenticated)
        callers["DNS:localhost"] = LOCAL_CALLER
        await GENERATE.call(channel)


async def test_an_expired_certificate_is_refused_on_both_sides(secrets: Path) -> None:
    expired = timedelta(minutes=-1)
    certify_again(secrets, "infer", lifetime=expired)
    async with guarded(secrets) as server:
        error = await failure(server, secrets / "infer", GENERATE.path)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        await generate(server, secrets / "admin")
        certify_again(secrets, "server", lifetime=expired)
        error = await failure(server, secrets / "admin", GENERATE.path)
        assert "certificate has expired" in str(error)


async def test_another_authority_is_refused_on_both_sides(secrets: Path, tmp_path: Path) -> None:
    other = certify(tmp_path / "other", "infer", Role.INFER)
    async with guarded(secrets) as server:
        error = await failure(server, other, GENERATE.path)
        assert "CERTIFICATE_VERIFY_FAILED" in str(error)
        (other / AUTHORITIES).write_bytes((secrets / "server" / AUTHORITIES).read_bytes())
        error = await failure(server, other, GENERATE.path)
        assert error.code is grpc.StatusCode.UNAVAILABLE


async def test_a_server_of_another_name_is_refused(secrets: Path) -> None:
    async with guarded(secrets) as server:
        error = await failure(server, secrets / "infer", GENERATE.path, "other.example")
        assert "Hostname Verification Check failed" in str(error)
        certify_again(secrets, "server", hosts=["other.example"], lifetime=timedelta(days=1))
        error = await failure(server, secrets / "infer", GENERATE.path)
        assert "Hostname Verification Check failed" in str(error)


async def test_certificates_change_under_load_and_nothing_is_lost(secrets: Path) -> None:
    """One stream stays open over every change, and each call between them is answered."""
    tls = ClientTls(secrets / "admin", look_s=0.0)
    async with guarded(secrets) as server:
        address = f"127.0.0.1:{server.port}"
        async with RenewedChannel(
            tls.credentials, lambda current: grpc.aio.secure_channel(address, current), tuple
        ) as channel:
            attach = channel.stream_stream(ATTACH.path)()
            for _ in range(3):
                await attach.write(b"")
                assert renew_certificates(SecretsDirectory(secrets), every=True)
                await asyncio.gather(*(GENERATE.call(channel) for _ in range(5)))
            assert channel.num_lives == 2
            await attach.done_writing()
            assert [answer async for answer in attach] == [b""]
            assert channel.num_lives == 1


async def test_what_is_damaged_leaves_the_last_certificate_in_force(
    secrets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarded(secrets) as server:
        await generate(server, secrets / "infer")
        for name, content in (
            (KEY, (secrets / "stranger" / KEY).read_text()),
            (CERTIFICATE, "half a certific"),
            (AUTHORITIES, ""),
        ):
            path = secrets / "server" / name
            good = path.read_text()
            path.write_text(content)
            await generate(server, secrets / "infer")
            assert name in caplog.text
            caplog.clear()
            path.write_text(good)
        (secrets / "server" / KEY).unlink()
        await generate(server, secrets / "infer")


async def test_an_authority_that_is_taken_away_is_not_trusted_any_more(
    secrets: Path, tmp_path: Path
) -> None:
    other = certify(tmp_path / "other", "infer", Role.INFER)
    old, new = (secrets / "server" / AUTHORITIES).read_text(), (other / AUTHORITIES).read_text()
    (other / AUTHORITIES).write_text(old)
    async with guarded(secrets) as server:
        authorities = secrets / "server" / AUTHORITIES
        for bundle, trusted in ((old, False), (old + new, True), (old, False)):
            authorities.write_text(bundle)
            if trusted:
                await generate(server, other)
            else:
                error = await failure(server, other, GENERATE.path)
                assert error.code is grpc.StatusCode.UNAVAILABLE
            await generate(server, secrets / "infer")


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        (KEY, None, "tls.key cannot be read"),
        (KEY, "x", "tls.key is no private key"),
        (CERTIFICATE, "x", "tls.crt holds no certificates"),
        (AUTHORITIES, "x", "ca.crt holds no certificates"),
    ],
)
def test_what_cannot_be_served_at_the_start_is_named(
    secrets: Path, name: str, content: str | None, refusal: str
) -> None:
    path = secrets / "server" / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=refusal):
        ServerTls(secrets / "server", mutual=True)


async def scrape(port: int, tls: Path) -> bytes:
    """The answer; nothing if the connection is refused, of which TLS 1.3 may tell only then."""
    context = ssl.create_default_context(cafile=tls / AUTHORITIES)
    if (tls / CERTIFICATE).exists():
        context.load_cert_chain(tls / CERTIFICATE, tls / KEY)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        answer = await reader.read()
    except (ssl.SSLError, ConnectionError):
        return b""
    writer.close()
    return answer


async def test_metrics_are_for_those_whose_certificate_the_authority_signed(
    secrets: Path, tmp_path: Path
) -> None:
    registry = CollectorRegistry()
    Counter("lorry_test", "of this test", registry=registry)
    tls = ServerTls(secrets / "server", mutual=True)
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    (nobody / AUTHORITIES).write_bytes((secrets / "server" / AUTHORITIES).read_bytes())
    async with serving_metrics("127.0.0.1:0", registry, tls) as port:
        assert port is not None
        assert b"lorry_test_total" in await scrape(port, secrets / "stranger")
        assert await scrape(port, nobody) == b""
        other = certify(tmp_path / "other", "server")
        for file in (CERTIFICATE, KEY, AUTHORITIES):
            (secrets / "server" / file).write_bytes((other / file).read_bytes())
        assert b"lorry_test_total" in await scrape(port, other)
        assert await scrape(port, secrets / "stranger") == b""


async def test_probes_are_answered_in_plain_text_at_a_port_for_nothing_else(
    secrets: Path, unused_tcp_port: int
) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    tls = ServerTls(secrets / "server", mutual=True)
    credentials = Credentials(tls=secrets / "infer")
    async with (
        serving_all(
            Authenticator(None, dict), tls=tls, credentials=credentials, health_address=address
        ) as (server, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        await server.set_ready(True)
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"\n\treadiness", timeout=10) == b"\x08\x01"
        for path in TABLE:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await METHODS[path].call(channel, "guess")
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
