import asyncio
import json
import logging
import time
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest

from lorry.rpc.boundary import Boundary
from lorry.rpc.call_counts import CallCounts
from lorry.rpc.errors import (
    DeadlineExpired,
    InvalidRequest,
    LorryError,
    NoWorker,
    QueueFull,
    Violation,
)
from lorry.rpc.identity import Authenticator
from lorry.rpc.status import from_rpc
from tests.support.services import METHODS, serving_all

KINDS = {method.kind: path for path, method in METHODS.items()}  # one method of each


async def failure(path: str, error: Exception) -> LorryError:
    """What a caller sees of `error`, raised by the method."""

    def hook() -> None:
        raise error

    async with serving_all(Authenticator(), hook=hook) as (_, channel):
        with pytest.raises(grpc.RpcError) as failed:
            await METHODS[path].call(channel)
    return from_rpc(failed.value)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_method_raises_is_what_its_caller_catches(kind: str) -> None:
    error = QueueFull("the queue holds 7", retry_after_s=0.5, queueDepth=7)
    received = await failure(KINDS[kind], error)
    assert type(received) is QueueFull
    assert str(received) == "the queue holds 7"
    assert (received.retry_after_s, received.metadata) == (0.5, {"queueDepth": "7"})


@pytest.mark.parametrize("kind", KINDS)
async def test_a_defect_is_logged_and_its_text_stays_inside(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="lorry.rpc.boundary")
    received = await failure(KINDS[kind], RuntimeError("the secret"))
    assert received.code is grpc.StatusCode.INTERNAL
    assert received.reason == "ENGINE_FAILURE"
    assert "secret" not in str(received)
    assert "the secret" in caplog.text
    assert KINDS[kind] in caplog.text


async def test_an_error_of_a_caller_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    await failure(KINDS["unary_unary"], InvalidRequest("spec: bad"))
    assert not [record for record in caplog.records if record.name.startswith("lorry")]


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_no_message_is_the_callers_error(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    method = METHODS[KINDS[kind]]
    sent: Any = iter([b"\xff"]) if kind.startswith("stream") else b"\xff"
    async with serving_all(Authenticator()) as (_, channel):
        call = getattr(channel, kind)(method.path)(sent, timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await (anext(aiter(call)) if kind.endswith("stream") else call)
    received = from_rpc(failed.value)
    assert type(received) is InvalidRequest
    assert method.request.DESCRIPTOR.full_name in str(received)
    assert not [record for record in caplog.records if record.name.startswith("lorry")]


async def test_nothing_of_a_stranger_is_parsed() -> None:
    async with serving_all(Authenticator(dict)) as (_, channel):
        call: Any = channel.unary_unary(KINDS["unary_unary"])
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(b"\xff", timeout=30)
    assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_largest_error_arrives() -> None:
    long = "\N{SNOWMAN}" * 10_000
    error = InvalidRequest(long, violations=[Violation(long, long)] * 100, adapter=long)
    received = await failure(KINDS["unary_unary"], error)
    assert type(received) is InvalidRequest
    assert received.violations


async def test_all_four_kinds_of_methods_are_there() -> None:
    assert set(KINDS) == {"unary_unary", "unary_stream", "stream_unary", "stream_stream"}


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving_all(Authenticator()) as (_, channel):
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/lorry.v1.InferenceService/Guess"
        )
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(b"")
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_retry_hint_is_one_for_grpcs_own_retries_too() -> None:
    """A client with a retry policy waits as long as it is told, and then succeeds."""
    failures = [NoWorker("none", retry_after_s=0.3), NoWorker("none", retry_after_s=0.3)]

    def hook() -> None:
        if failures:
            raise failures.pop()

    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.001s",
        "maxBackoff": "0.001s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    async with serving_all(Authenticator(), hook=hook) as (server, _):
        options = [("grpc.service_config", config)]
        address = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            start_s = time.monotonic()
            await METHODS[KINDS["unary_unary"]].call(channel)
            assert time.monotonic() - start_s > 0.5
    assert not failures


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
async def test_a_malformed_probe_is_its_callers_error(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    method = {"unary_unary": "Check", "unary_stream": "Watch"}[kind]
    async with serving_all(Authenticator(dict)) as (_, channel):
        call = getattr(channel, kind)(f"/grpc.health.v1.Health/{method}")(b"\xff", timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await (anext(aiter(call)) if kind == "unary_stream" else call)
    assert type(from_rpc(failed.value)) is InvalidRequest
    assert not caplog.records


class GoneClient:
    """The context of a call whose client left while its status was on its way."""

    def add_done_callback(self, callback: object) -> None:
        """It is done."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5000"

    async def read(self) -> bytes:
        return b""

    async def abort(self, *status: object) -> None:
        raise grpc.aio.InternalError("Failed SendStatusFromServerOperation")


class Details(NamedTuple):
    method: str


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
async def test_an_error_that_cannot_be_sent_any_more_is_no_defect(kind: str) -> None:
    """The call counts as cancelled, over which gRPC passes; any other end it would log."""

    def hook() -> None:
        raise InvalidRequest("spec: nobody reads this")

    async def service(_: object) -> Any:
        return METHODS[KINDS[kind]].handler(hook)

    boundary: Any = Boundary(Authenticator(), CallCounts())
    wrapped = await boundary.intercept_service(service, Details(KINDS[kind]))
    answer = getattr(wrapped, kind.replace("unary_", "stream_", 1))(None, GoneClient())
    with pytest.raises(asyncio.CancelledError):
        await (anext(answer) if kind.endswith("stream") else answer)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stranger_is_refused_before_anything_else_comes(kind: str) -> None:
    """Whoever is not known cannot keep a call open by sending nothing."""
    path = KINDS[kind]
    async with serving_all(Authenticator(dict)) as (_, channel):
        call: Any = channel.stream_stream(path)(timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
async def test_a_request_that_does_not_come_is_not_waited_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.rpc.boundary.REQUEST_S", 0.1)
    async with serving_all(Authenticator()) as (_, channel):
        call: Any = channel.stream_stream(KINDS[kind])(timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert isinstance(from_rpc(failed.value), DeadlineExpired)
        call = channel.stream_stream(KINDS[kind])(iter(()), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert isinstance(from_rpc(failed.value), InvalidRequest)
