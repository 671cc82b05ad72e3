import asyncio
import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from lorry.rpc.errors import QueueFull
from lorry.rpc.health_service import MAX_WATCHES
from lorry.rpc.identity import Authenticator, Caller, Role
from lorry.rpc.server import ConnectionAge, Server, check_address, serving, stop_requested
from lorry.rpc.status import from_rpc
from tests.support.services import METHODS, serving_all

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = sorted({path.split("/")[1] for path in METHODS})
TOKENS = {hashlib.sha256(b"secret").digest(): Caller("acme", frozenset({Role.INFER}))}
Running = tuple[Server, grpc.aio.Channel]


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with serving_all(Authenticator(lambda: TOKENS)) as running:
        yield running


async def check(channel: grpc.aio.Channel, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return int(response.status)


async def test_a_server_is_alive_at_once_and_ready_when_its_owner_says_so(running: Running) -> None:
    server, channel = running
    for name in ("", "liveness"):
        assert await check(channel, name) == SERVING
    for name in ("readiness", *SERVICES):
        assert await check(channel, name) == NOT_SERVING
    await server.set_ready(True)
    for name in ("readiness", *SERVICES):
        assert await check(channel, name) == SERVING


async def test_draining_answers_not_serving_to_everything(running: Running) -> None:
    server, channel = running
    await server.set_ready(True)
    await server.start_draining()
    for name in ("", "readiness", *SERVICES):
        assert await check(channel, name) == NOT_SERVING
    await server.set_ready(True)
    assert await check(channel, "readiness") == NOT_SERVING


async def test_watch_tells_each_change_of_readiness(running: Running) -> None:
    server, channel = running
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=30))
    assert (await anext(watch)).status == NOT_SERVING
    await server.set_ready(True)
    assert (await anext(watch)).status == SERVING
    await server.start_draining()
    assert (await anext(watch)).status == NOT_SERVING


async def test_each_watch_is_told_also_after_another_has_ended(running: Running) -> None:
    server, channel = running
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="readiness")
    calls = [stub.Watch(request, timeout=30) for _ in range(2)]
    watches = [aiter(call) for call in calls]
    for watch in watches:
        assert (await anext(watch)).status == NOT_SERVING
    calls[0].cancel()
    await asyncio.sleep(0.1)
    await server.set_ready(True)
    assert (await anext(watches[1])).status == SERVING


async def test_a_watch_of_an_unknown_service_waits_for_it(running: Running) -> None:
    stub: Any = health_pb2_grpc.HealthStub(running[1])
    watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="x.Y"), timeout=30))
    assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_watches_are_limited_and_give_their_places_back(running: Running) -> None:
    stub: Any = health_pb2_grpc.HealthStub(running[1])
    request = health_pb2.HealthCheckRequest(service="liveness")
    calls = [stub.Watch(request, timeout=60) for _ in range(MAX_WATCHES)]
    for call in calls:
        assert (await call.read()).status == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await anext(aiter(stub.Watch(request, timeout=60)))
    assert isinstance(from_rpc(failed.value), QueueFull)
    for call in calls:
        call.cancel()
    await asyncio.sleep(0.2)
    assert (await anext(aiter(stub.Watch(request, timeout=60)))).status == SERVING


async def test_the_health_of_an_unknown_service_is_not_found(running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await check(running[1], "lorry.v1.Nothing")
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_every_service_and_describes_it(
    running: Running, version: str
) -> None:
    listed, described = await reflect(running[1], version, "Bearer secret")
    names = {service.name for service in listed.list_services_response.service}
    assert names >= {*SERVICES, "grpc.health.v1.Health"}
    assert described.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_needs_a_token(running: Running, version: str) -> None:
    # Nothing is sent: a message that the refusal overtakes may hide it (grpc/grpc issue 36066).
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await reflect(running[1], version, "Bearer guess", [])
    assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED


LIST_AND_DESCRIBE = [
    reflection_pb2.ServerReflectionRequest(list_services=""),
    reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[0]),
]


async def reflect(
    channel: grpc.aio.Channel,
    version: str,
    authorization: str,
    requests: Sequence[reflection_pb2.ServerReflectionRequest] = LIST_AND_DESCRIBE,
) -> list[reflection_pb2.ServerReflectionResponse]:
    call: grpc.aio.StreamStreamMultiCallable[
        reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
    ] = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    responses = call(iter(requests), metadata=(("authorization", authorization),), timeout=10)
    return [response async for response in responses]


async def test_a_burst_of_calls_is_served_to_the_last(running: Running) -> None:
    server, _ = running
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="liveness")
        # While this loop sends, the server, which runs on it too, takes none: all of them wait.
        calls = [stub.Check.future(request, timeout=120) for _ in range(4000)]
        answers = await asyncio.to_thread(lambda: [call.exception() for call in calls])
    assert answers == [None] * len(calls)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:1", "[::1]:50051", "localhost:1"])
def test_loopback_addresses_are_served_in_plain_text(address: str) -> None:
    check_address(address, guarded=False)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.com:1"])
def test_other_addresses_need_insecure(address: str) -> None:
    with pytest.raises(ValueError, match="--insecure"):
        check_address(address, guarded=False)
    check_address(address, guarded=True)


@pytest.mark.parametrize("address", ["", "50051", "127.0.0.1", "127.0.0.1:http", ":50051"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        check_address(address, guarded=True)


async def test_an_address_in_use_is_named(running: Running) -> None:
    address = f"127.0.0.1:{running[0].port}"
    with pytest.raises(ValueError, match=f"'{address}' cannot be bound"):
        async with serving(
            lambda _: None, services=[], address=address, authenticator=Authenticator()
        ):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_stop_is_requested_by_sigint_and_sigterm(number: signal.Signals) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.create_task(stop_requested())
    await asyncio.sleep(0)
    try:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stopped, 10)
    finally:
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)


async def health_command(*arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *["-m", "lorry.rpc.health", *arguments],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, stdout.decode(), stderr.decode()


async def test_the_health_command_exits_with_the_readiness(running: Running) -> None:
    server, _ = running
    address = f"127.0.0.1:{server.port}"
    assert (await health_command("--address", address))[0] == 1
    await server.set_ready(True)
    status, stdout, _ = await health_command("--address", address)
    assert (status, stdout) == (0, f"{address} readiness: SERVING\n")


async def test_the_health_command_checks_a_named_service(running: Running) -> None:
    address = f"127.0.0.1:{running[0].port}"
    status, _, _ = await health_command("--address", address, "--service", "liveness")
    assert status == 0


async def test_the_health_command_tells_why_there_is_no_answer() -> None:
    status, _, stderr = await health_command("--address", "127.0.0.1:1", "--timeout-s", "2")
    assert status == 1
    assert stderr.startswith("127.0.0.1:1 readiness: UNAVAILABLE")
    assert "Traceback" not in stderr


async def test_an_open_watch_does_not_hold_the_server_up() -> None:
    stack = contextlib.AsyncExitStack()
    server = await stack.enter_async_context(
        serving(
            lambda server: None,
            services=[],
            address="127.0.0.1:0",
            authenticator=Authenticator(),
            grace_s=600,
        )
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=600))
        assert (await anext(watch)).status == NOT_SERVING
        async with asyncio.timeout(30):
            await stack.aclose()
            assert {answer.status async for answer in watch} <= {NOT_SERVING}


async def test_a_call_that_would_never_end_ends_with_its_connection() -> None:
    async with (
        serving(
            lambda server: None,
            services=[],
            address="127.0.0.1:0",
            authenticator=Authenticator(lambda: TOKENS),
            connection_age=ConnectionAge(renew_s=0.1, grace_s=0.1),
        ) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in stub.Watch(health_pb2.HealthCheckRequest(), timeout=60):
                pass
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
