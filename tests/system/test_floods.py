"""Floods from this machine's loopback, each bounded: the services stay up and serve others.

While they last another tenant's stream runs again and again, and its tokens never change.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from hpack import Encoder, NeverIndexedHeaderTuple
from hyperframe.frame import ContinuationFrame, HeadersFrame

from lorry.client import Request
from lorry.rpc.channel import bearer
from lorry.rpc.errors import DuplicateRequest
from lorry.rpc.identity import Authenticator, Role
from lorry.rpc.tls import ServerTls
from lorry.v1 import inference_service_pb2 as pb
from tests.support.certificates import certify
from tests.support.guarded_stack import SERVICE_OF, GuardedStack, token
from tests.support.processes import ready
from tests.support.raw_http2 import raw_http2, request_headers
from tests.support.services import serving_all
from tests.support.streams import streamed

GENERATE = "/lorry.v1.InferenceService/Generate"
UNAUTHENTICATED, UNIMPLEMENTED, RESOURCE_EXHAUSTED = "16", "12", "8"
RESETS, HALF_OPEN, SILENT = 10_000, 2_000, 150
BYSTANDER = Request(prompt="lorry>", seed=3, max_tokens=60, ignore_eos=True)
SERVICES = sorted(set(SERVICE_OF.values()))

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuardedStack]:
    stack = GuardedStack(tmp_path_factory.mktemp("flooded"))
    try:
        await stack.start()
        await ready(stack.router.address)
        yield stack
    finally:
        await stack.stop()


@contextlib.asynccontextmanager
async def others_are_served(stack: GuardedStack) -> AsyncIterator[None]:
    """One tenant's stream after another runs in the block, and after it a new client's."""
    async with stack.client_of("blue") as client:
        expected = await streamed(client, BYSTANDER)
        streams: list[list[int]] = []
        over = asyncio.Event()

        async def run() -> None:
            while not over.is_set():
                streams.append(await streamed(client, BYSTANDER))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run())
            yield
            over.set()
    async with stack.client_of("red") as client:
        streams.append(await streamed(client, BYSTANDER))
    assert len(streams) > 1
    assert all(token_ids == expected for token_ids in streams)
    for name in SERVICES:
        await ready(getattr(stack, name).address)


async def reset_rapidly(address: str) -> None:
    """Calls that are taken back as soon as they are begun."""
    async with raw_http2(address) as connection:
        for _ in range(RESETS // 50):
            for _ in range(50):
                stream = connection.open(request_headers(GENERATE))
                connection.state.reset_stream(stream)
            await connection.flush()
        last = connection.open(request_headers(GENERATE))
        await connection.flush()
        await connection.until_ended({last})


async def leave_half_open(address: str) -> None:
    """Calls of a stranger without a request: he cannot keep them."""
    async with raw_http2(address) as connection:
        streams = {connection.open(request_headers(GENERATE)) for _ in range(HALF_OPEN)}
        await connection.flush()
        await connection.until_ended(streams)
        assert {connection.statuses[stream] for stream in streams} == {UNAUTHENTICATED}


async def say_nothing(address: str) -> None:
    """Connections that never get to a first call: they are closed."""
    host, _, port = address.rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(SILENT)]
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            for reader, _ in silent:
                await reader.read()  # to its end
    for _, writer in silent:
        writer.close()


async def test_floods_leave_others_served(stack: GuardedStack, tmp_path: Path) -> None:
    router = stack.router.address
    secrets = tmp_path / "secrets"
    tls = ServerTls(certify(secrets, "server", Role.INFER), mutual=True)
    async with (
        serving_all(Authenticator(dict), tls=tls) as (secure, _),
        others_are_served(stack),
    ):
        await asyncio.gather(
            reset_rapidly(router),
            leave_half_open(router),
            *(say_nothing(getattr(stack, name).address) for name in SERVICES),
            say_nothing(f"127.0.0.1:{secure.port}"),
        )


@pytest.mark.parametrize(
    "path", [GENERATE[1:], f"/{GENERATE}", GENERATE + "/", GENERATE.upper(), "/", "*"]
)
async def test_only_the_exact_path_is_a_method(stack: GuardedStack, path: str) -> None:
    """Also for who may call everything: there is no other way to write a name."""
    authorization = dict(bearer(token("red", Role.ADMIN)))
    async with raw_http2(stack.router.address) as connection:
        stream = connection.open(request_headers(path, *authorization.items()), end=True)
        await connection.flush()
        await connection.until_ended({stream})
        assert connection.statuses.get(stream) in (UNIMPLEMENTED, None)


@pytest.mark.parametrize("name", SERVICES)
async def test_a_message_that_is_announced_too_large_is_not_waited_for(
    stack: GuardedStack, name: str
) -> None:
    path = {"router": GENERATE, "store": "/lorry.v1.AdapterService/GetAdapter"}.get(
        name, "/lorry.v1.WorkerService/GetWorkerStatus"
    )
    authorization = dict(bearer(token("red", Role.ADMIN)))
    async with raw_http2(getattr(stack, name).address) as connection:
        stream = connection.open(request_headers(path, *authorization.items()))
        connection.state.send_data(stream, b"\x00\xff\xff\xff\xff")  # 4 GiB
        await connection.flush()
        await connection.until_ended({stream})
        assert connection.statuses[stream] == RESOURCE_EXHAUSTED


@pytest.mark.parametrize("name", SERVICES)
async def test_headers_without_end_end_the_connection_or_the_call(
    stack: GuardedStack, name: str
) -> None:
    """CONTINUATION frames until the server has enough, at most 4 MiB."""
    async with others_are_served(stack), raw_http2(getattr(stack, name).address) as connection:
        connection.open(request_headers(GENERATE))
        connection.state.clear_outbound_data_buffer()
        encoder = Encoder()
        await connection.send(
            HeadersFrame(1, encoder.encode(request_headers(GENERATE))).serialize()
        )
        filler = encoder.encode([NeverIndexedHeaderTuple("x-filler", "y" * 16_000)], huffman=False)
        for _ in range(256):
            await connection.send(ContinuationFrame(1, filler).serialize())
            if connection.closed:
                break
        else:
            await connection.send(ContinuationFrame(1, b"", flags=["END_HEADERS"]).serialize())
            await connection.until_ended({1})


async def test_too_much_metadata_is_refused(stack: GuardedStack) -> None:
    async with grpc.aio.insecure_channel(stack.router.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(GENERATE)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(b"", metadata=(("x-filler", "y" * 100_000),), timeout=60)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_that_is_replayed_runs_at_most_once_at_a_time(stack: GuardedStack) -> None:
    """The same bytes again and again: what runs is not disturbed, and nothing is kept of them."""
    request = Request(prompt="p", request_id="replayed", max_tokens=200, ignore_eos=True)
    message = pb.GenerateRequest(spec=request.to_proto()).SerializeToString()
    metadata = bearer(token("red", Role.INFER))
    async with others_are_served(stack), grpc.aio.insecure_channel(stack.router.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(GENERATE)
        answers = await asyncio.gather(
            *(call(message, metadata=metadata, timeout=60) for _ in range(100)),
            return_exceptions=True,
        )
        errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert len(errors) < len(answers)
        assert {error.code() for error in errors} == {DuplicateRequest.code}
    await stack.idle()
