import asyncio

import grpc
import pytest

from lorry.rpc.call_counts import OK, CallCounts, Outcome
from lorry.rpc.errors import AdapterNotFound, LorryError, QueueFull, RemoteError
from lorry.rpc.identity import Authenticator
from lorry.rpc.server import serving
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from tests.support.waiting import until

GENERATE = "/lorry.v1.InferenceService/Generate"
STREAM = "/lorry.v1.InferenceService/StreamGenerate"


class Told(InferenceServiceServicer):
    """Does what the request's model names."""

    async def Generate(self, request, context):
        match request.spec.model:
            case "fail":
                raise QueueFull("full")
            case "defect":
                raise KeyError("x")
            case "hang":
                await asyncio.Event().wait()
        return pb.GenerateResponse()

    async def StreamGenerate(self, request, context):
        yield pb.StreamGenerateResponse()
        if request.spec.model == "hang":
            await asyncio.Event().wait()
        if request.spec.model == "fail":
            raise AdapterNotFound("none")


@pytest.fixture
async def told():
    calls = CallCounts()
    async with (
        serving(
            lambda server: add_InferenceServiceServicer_to_server(Told(), server),
            services=[],
            address="127.0.0.1:0",
            authenticator=Authenticator(),
            grace_s=0,
            calls=calls,
        ) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield InferenceServiceStub(channel), calls, channel


def generate(stub, model):
    return stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(model=model)))


def stream(stub, model):
    return stub.StreamGenerate(pb.StreamGenerateRequest(spec=pb.GenerationSpec(model=model)))


@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        ("", OK),
        ("fail", ("RESOURCE_EXHAUSTED", "QUEUE_FULL")),
        ("defect", ("INTERNAL", "ENGINE_FAILURE")),
    ],
)
async def test_a_call_is_counted_by_how_it_ended(told, model, outcome):
    stub, calls, _ = told
    await asyncio.gather(generate(stub, model), return_exceptions=True)
    await until(lambda: calls.ended.total() == 1)
    assert calls.ended == {(GENERATE, *outcome): 1}
    assert calls.in_progress[GENERATE,] == 0


@pytest.mark.parametrize(
    ("model", "outcome"), [("", OK), ("fail", ("NOT_FOUND", "ADAPTER_NOT_FOUND"))]
)
async def test_a_stream_is_counted_once_by_how_it_ended(told, model, outcome):
    stub, calls, _ = told
    try:
        async for _ in stream(stub, model):
            pass
    except grpc.aio.AioRpcError:
        pass
    await until(lambda: calls.ended.total() == 1)
    assert calls.ended == {(STREAM, *outcome): 1}


@pytest.mark.parametrize(("begin", "method"), [(generate, GENERATE), (stream, STREAM)])
async def test_a_call_whose_client_left_is_cancelled(told, begin, method):
    stub, calls, _ = told
    call = begin(stub, "hang")
    await asyncio.wait([asyncio.ensure_future(call.initial_metadata())], timeout=0.2)
    await until(lambda: calls.in_progress[method,] == 1)
    call.cancel()
    await until(lambda: calls.ended.total() == 1)
    assert calls.ended == {(method, "CANCELLED", ""): 1}
    assert calls.in_progress[method,] == 0


async def test_unknown_methods_make_no_labels(told):
    stub, calls, channel = told
    with pytest.raises(grpc.aio.AioRpcError):
        await channel.unary_unary("/lorry.v1.InferenceService/Nothing")(b"")
    await generate(stub, "")
    await until(lambda: calls.ended.total() == 1)
    assert set(calls.in_progress) == {(GENERATE,)}


def test_a_peers_own_reason_is_no_label():
    error = RemoteError("x", status_code=grpc.StatusCode.NOT_FOUND, status_reason="ANYTHING-17")
    assert Outcome.of(error) == ("NOT_FOUND", "")
    assert Outcome.of(LorryError("x")) == ("INTERNAL", "ENGINE_FAILURE")
