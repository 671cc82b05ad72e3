"""What no service may be brought down by: each gets its status, and disturbs nobody else.

While all of it is sent, another tenant's stream runs again and again, and its tokens are always
those of the undisturbed run.
"""

import asyncio
import contextlib
import json
import math
import pickle
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from safetensors.numpy import load, save

from demo import tasks
from lorry.client import Client, Request
from lorry.rpc.channel import bearer
from lorry.rpc.errors import (
    ERRORS,
    AdapterInvalid,
    AdapterNotFound,
    ContextLengthExceeded,
    DeadlineExpired,
    DuplicateRequest,
    FeatureUnsupported,
    InvalidRequest,
    InvalidSampling,
    LorryError,
    ModelNotFound,
    PermissionDenied,
    PoolTooSmall,
    Unauthenticated,
)
from lorry.rpc.identity import METHOD_ROLES, Role
from lorry.rpc.status import from_rpc
from lorry.v1 import adapter_service_pb2, common_pb2
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from lorry.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.command import REPO
from tests.support.guarded_stack import TENANTS, GuardedStack, method_address, token
from tests.support.processes import ready
from tests.support.services import METHODS
from tests.support.streams import streamed

REVERSE = REPO / "demo" / "adapters" / "reverse"
CONFIG: dict[str, Any] = json.loads((REVERSE / "adapter_config.json").read_text())
WEIGHTS = (REVERSE / "adapter_model.safetensors").read_bytes()
CONTEXT_TOKENS = 1024
VOCAB_SIZE = 260
POOL_PAGES = 62  # less than a whole context
MAX_RUNNING = 2
BYSTANDER = Request(
    prompt=tasks.make_prompt("bystander"),
    adapter="reverse",
    temperature=1.2,
    seed=11,
    max_tokens=150,
    ignore_eos=True,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Bystander:
    """A tenant that streams while others misbehave."""

    def __init__(self, client: Client, expected: list[int]) -> None:
        self.num_streams = 0
        self._client = client
        self._expected = expected
        self._stopping = False

    async def run(self) -> None:
        while not self._stopping:
            assert await streamed(self._client, BYSTANDER) == self._expected
            self.num_streams += 1

    def stop(self) -> None:
        """After the stream that runs."""
        self._stopping = True


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuardedStack]:
    limits = ["--pool-pages", str(POOL_PAGES), "--max-running", str(MAX_RUNNING)]
    stack = GuardedStack(tmp_path_factory.mktemp("guarded"), *limits, "--max-waiting", "0")
    try:
        await stack.start()
        await ready(stack.router.address)
        for tenant in TENANTS:
            async with stack.client_of(tenant, Role.MANAGE) as client:
                await client.adapters.push(REVERSE)
                await client.adapters.push(REVERSE, adapter_id=f"of-{tenant}")
        yield stack
    finally:
        await stack.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bystander(stack: GuardedStack) -> AsyncIterator[asyncio.Task[None]]:
    async with stack.client_of("blue") as client:
        bystander = Bystander(client, await streamed(client, BYSTANDER))
        running = asyncio.create_task(bystander.run())
        yield running
        bystander.stop()
        await running
        assert bystander.num_streams > 1


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nobody_is_disturbed(
    stack: GuardedStack, bystander: asyncio.Task[None]
) -> AsyncIterator[None]:
    """After each test the bystander runs on, and the next request succeeds."""
    yield
    if bystander.done():
        await bystander
    async with stack.client_of("red") as client:
        request = Request(
            prompt=tasks.make_prompt("lorry"), adapter="reverse", max_tokens=16, temperature=0.0
        )
        assert (await client.generate(request, timeout_s=60)).text == "yrrol"


class Refusal(NamedTuple):
    """What a request is answered with."""

    error: type[LorryError]
    field: str | None = None  # of its only violation
    metadata: Mapping[str, str] = {}

    def check(self, error: LorryError) -> None:
        assert type(error) is self.error, error
        assert ERRORS[error.code, error.reason] is self.error
        fields = [violation.field for violation in error.violations]
        assert fields == ([] if self.field is None else [self.field])
        assert self.metadata.items() <= error.metadata.items()


@contextlib.asynccontextmanager
async def refused(refusal: Refusal) -> AsyncIterator[None]:
    try:
        yield
    except LorryError as error:
        refusal.check(error)
    except grpc.aio.AioRpcError as error:
        refusal.check(from_rpc(error))
    else:
        raise AssertionError("it was not refused")


def ids(*token_ids: int) -> dict[str, Any]:
    return {"token_ids": common_pb2.TokenIds(ids=token_ids)}


def sampling(**fields: Any) -> dict[str, Any]:
    return {"prompt": "p", "sampling": common_pb2.SamplingParams(**fields)}


def stopping(**fields: Any) -> dict[str, Any]:
    return {"prompt": "p", "stopping": common_pb2.StoppingOptions(**fields)}


def bad_sampling(field: str) -> Refusal:
    return Refusal(InvalidSampling, f"sampling.{field}")


NOT_FOUND = "tenants/red/adapters/none"
SPECS: dict[str, tuple[dict[str, Any], Refusal]] = {
    "no prompt": ({}, Refusal(InvalidRequest, "prompt")),
    "an empty prompt": ({"prompt": ""}, Refusal(InvalidRequest, "prompt")),
    "no tokens": (ids(), Refusal(InvalidRequest, "token_ids.ids")),
    "an empty chat": ({"chat": pb.ChatPrompt()}, Refusal(InvalidRequest, "chat.messages")),
    "a token out of range": (ids(5, VOCAB_SIZE), Refusal(InvalidRequest, "token_ids.ids")),
    "the largest token": (ids(2**32 - 1), Refusal(InvalidRequest, "token_ids.ids")),
    "a prompt beyond the context": (
        ids(*[5] * CONTEXT_TOKENS),
        Refusal(ContextLengthExceeded, "prompt"),
    ),
    "a text beyond the context": (
        {"prompt": "x" * 5000},
        Refusal(ContextLengthExceeded, "prompt"),
    ),
    "a text of more than 1 MiB": (
        {"prompt": "x" * ((1 << 20) + 1)},
        Refusal(InvalidRequest, "prompt"),
    ),
    "max_tokens beyond the context": (
        stopping(max_tokens=CONTEXT_TOKENS),
        Refusal(ContextLengthExceeded, "stopping.max_tokens"),
    ),
    "the largest max_tokens": (
        stopping(max_tokens=2**32 - 1),
        Refusal(ContextLengthExceeded, "stopping.max_tokens"),
    ),
    "max_tokens 0": (stopping(max_tokens=0), Refusal(InvalidRequest, "stopping.max_tokens")),
    "min_tokens above max_tokens": (
        stopping(max_tokens=2, min_tokens=3),
        Refusal(InvalidRequest, "stopping.min_tokens"),
    ),
    "17 stop strings": (
        stopping(stop_strings=["x"] * 17),
        Refusal(InvalidRequest, "stopping.stop_strings"),
    ),
    "a stop string of 65 characters": (
        stopping(stop_strings=["x" * 65]),
        Refusal(InvalidRequest, "stopping.stop_strings"),
    ),
    "an empty stop string": (
        stopping(stop_strings=[""]),
        Refusal(InvalidRequest, "stopping.stop_strings"),
    ),
    "a stop token out of range": (
        stopping(stop_token_ids=[VOCAB_SIZE]),
        Refusal(InvalidRequest, "stopping.stop_token_ids"),
    ),
    "temperature -1": (sampling(temperature=-1), bad_sampling("temperature")),
    "temperature NaN": (sampling(temperature=math.nan), bad_sampling("temperature")),
    "temperature infinite": (sampling(temperature=math.inf), bad_sampling("temperature")),
    "top_p 2": (sampling(top_p=2), bad_sampling("top_p")),
    "top_p 0": (sampling(top_p=0), bad_sampling("top_p")),
    "top_p NaN": (sampling(top_p=math.nan), bad_sampling("top_p")),
    "min_p -1": (sampling(min_p=-1), bad_sampling("min_p")),
    "min_p NaN": (sampling(min_p=math.nan), bad_sampling("min_p")),
    "repetition_penalty 0": (sampling(repetition_penalty=0), bad_sampling("repetition_penalty")),
    "presence_penalty NaN": (
        sampling(presence_penalty=math.nan),
        bad_sampling("presence_penalty"),
    ),
    "frequency_penalty 3": (sampling(frequency_penalty=3), bad_sampling("frequency_penalty")),
    "a bias of NaN": (sampling(logit_bias={1: math.nan}), bad_sampling("logit_bias")),
    "a bias out of range": (sampling(logit_bias={1: 101}), bad_sampling("logit_bias")),
    "301 biases": (sampling(logit_bias=dict.fromkeys(range(301), 1)), bad_sampling("logit_bias")),
    "a bias of no token": (
        sampling(logit_bias={VOCAB_SIZE: 1}),
        bad_sampling("logit_bias"),
    ),
    "21 logprobs": (
        {"prompt": "p", "response": common_pb2.ResponseOptions(top_logprobs=21)},
        Refusal(InvalidRequest, "response.top_logprobs"),
    ),
    "a grammar": (
        {"prompt": "p", "guided": common_pb2.GuidedDecoding(regex="a")},
        Refusal(FeatureUnsupported),
    ),
    "another model": (
        {"prompt": "p", "model": "other"},
        Refusal(ModelNotFound, metadata={"model": "'other'"}),
    ),
    "an unknown adapter": (
        {"prompt": "p", "adapter": "adapters/none"},
        Refusal(AdapterNotFound, metadata={"adapter": NOT_FOUND}),
    ),
    "another tenant's adapter": (
        {"prompt": "p", "adapter": "tenants/blue/adapters/of-blue"},
        Refusal(AdapterNotFound, metadata={"adapter": "tenants/blue/adapters/of-blue"}),
    ),
    "a path for an adapter": (
        {"prompt": "p", "adapter": "adapters/../../etc"},
        Refusal(InvalidRequest, "adapter"),
    ),
    "a request id of 129 characters": (
        {"prompt": "p", "request_id": "x" * 129},
        Refusal(InvalidRequest, "request_id"),
    ),
    "a request id with a line break": (
        {"prompt": "p", "request_id": "a\nb"},
        Refusal(InvalidRequest, "request_id"),
    ),
    "17 labels": (
        {"prompt": "p", "labels": {str(n): "" for n in range(17)}},
        Refusal(InvalidRequest, "labels"),
    ),
    "more KV than the pool has": (
        {"prompt": "p", "stopping": common_pb2.StoppingOptions(max_tokens=1000)},
        Refusal(PoolTooSmall),
    ),
}


@pytest.mark.parametrize("name", SPECS)
async def test_a_request_that_cannot_be_served_is_refused(stack: GuardedStack, name: str) -> None:
    fields, refusal = SPECS[name]
    spec = pb.GenerationSpec(**fields)
    metadata = bearer(token("red", Role.INFER))
    async with grpc.aio.insecure_channel(stack.router.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        async with refused(refusal):
            await stub.Generate(pb.GenerateRequest(spec=spec), metadata=metadata, timeout=60)
        async with refused(refusal):
            request = pb.StreamGenerateRequest(spec=spec)
            await stub.StreamGenerate(request, metadata=metadata, timeout=60).read()


async def test_a_request_id_is_taken_while_its_request_runs(stack: GuardedStack) -> None:
    request = Request(prompt="p", request_id="mine", max_tokens=700, ignore_eos=True)
    async with stack.client_of("red") as client, client.stream(request):
        async with refused(Refusal(DuplicateRequest, metadata={"requestId": "mine"})):
            await client.generate(request)
        async with stack.client_of("blue") as other:  # another tenant's are other ids
            short = Request(prompt="p", request_id="mine", max_tokens=2, ignore_eos=True)
            assert (await other.generate(short, timeout_s=60)).completion.request_id == "mine"


async def test_deadlines_pass_in_the_queue_and_in_mid_stream(stack: GuardedStack) -> None:
    """The bystander and the first request are all that run."""
    long = Request(prompt="p", max_tokens=900, ignore_eos=True)
    async with stack.client_of("red") as client:
        for timeouts_s in ([0.2], [1.0, 0.2, 0.2, 0.2]):
            calls = [client.generate(long, timeout_s=timeout_s) for timeout_s in timeouts_s]
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert type(error) is DeadlineExpired


# Uploads


def entries(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_and_data() -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", WEIGHTS[:8])
    return json.loads(WEIGHTS[8 : 8 + length]), WEIGHTS[8 + length :]


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def tensors_with(change: Callable[[dict[str, Any]], None]) -> bytes:
    tensors = dict(load(WEIGHTS))
    change(tensors)
    return bytes(save(tensors))


def header_with(**fields: Any) -> bytes:
    header, data = header_and_data()
    header[NAME] |= fields
    return entries(header, data)


def not_finite(tensors: dict[str, Any]) -> None:
    tensors[NAME] = tensors[NAME].copy()
    tensors[NAME][0, 0] = np.nan


def missing(tensors: dict[str, Any]) -> None:
    del tensors[NAME]


def too_wide(tensors: dict[str, Any]) -> None:
    tensors[NAME] = np.zeros((tensors[NAME].shape[0], 4096), np.float32)


def of_another_model(tensors: dict[str, Any]) -> None:
    """Twice as wide everywhere."""
    for name, values in tensors.items():
        tensors[name] = np.repeat(values, 2, axis=1 if "lora_A" in name else 0)


def many_tensors(count: int) -> bytes:
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(b'"%d":%s' % (number, entry) for number in range(count)) + b"}"
    return struct.pack("<Q", len(text)) + text


class Upload(NamedTuple):
    field: str  # that the refusal names
    config: Mapping[str, Any] = CONFIG
    weights: Callable[[], bytes] = lambda: WEIGHTS


UPLOADS: dict[str, Upload] = {
    "another base model": Upload(NAME, weights=lambda: tensors_with(of_another_model)),
    "a wrong shape": Upload(NAME, weights=lambda: tensors_with(too_wide)),
    "another rank": Upload(NAME, config=CONFIG | {"r": 3}),
    "a dtype of 8 bytes": Upload(NAME, weights=lambda: header_with(dtype="F64")),
    "an unknown dtype": Upload(NAME, weights=lambda: header_with(dtype="Q4")),
    "NaN": Upload(NAME, weights=lambda: tensors_with(not_finite)),
    "a missing tensor": Upload(NAME, weights=lambda: tensors_with(missing)),
    "half a file": Upload("weights", weights=lambda: WEIGHTS[: len(WEIGHTS) // 2]),
    "half a header": Upload("weights", weights=lambda: WEIGHTS[:100]),
    "4 bytes": Upload("weights", weights=lambda: WEIGHTS[:4]),
    "offsets outside the file": Upload(
        NAME, weights=lambda: header_with(data_offsets=[1 << 40, (1 << 40) + 8])
    ),
    "offsets that overlap": Upload(NAME, weights=lambda: header_with(data_offsets=[4, 8])),
    "negative offsets": Upload(NAME, weights=lambda: header_with(data_offsets=[-8, 0])),
    "a shape that overflows": Upload(NAME, weights=lambda: header_with(shape=[1 << 40] * 4)),
    "a header of 2^63 bytes": Upload(
        "weights", weights=lambda: struct.pack("<Q", 1 << 63) + WEIGHTS[8:]
    ),
    "a tensor of 2^63 bytes": Upload(
        "x",
        weights=lambda: entries(
            {"x": {"dtype": "F32", "shape": [1 << 61], "data_offsets": [0, 1 << 63]}}, b"1234"
        ),
    ),
    "1,000,000 tensors": Upload("weights", weights=lambda: many_tensors(1_000_000)),
    "60,000 tensors": Upload("0", weights=lambda: many_tensors(60_000)),
    "a pickle": Upload("weights", weights=lambda: pickle.dumps({"x": [1.0] * 100})),
    "use_dora": Upload("use_dora", CONFIG | {"use_dora": True}),
    "bias": Upload("bias", CONFIG | {"bias": "all"}),
    "modules_to_save": Upload("modules_to_save", CONFIG | {"modules_to_save": ["lm_head"]}),
    "pissa": Upload("init_lora_weights", CONFIG | {"init_lora_weights": "pissa"}),
    "another method": Upload("peft_type", CONFIG | {"peft_type": "PROMPT_TUNING"}),
    "a field of next year": Upload("use_xora", CONFIG | {"use_xora": 2}),
    "rank 257": Upload("r", CONFIG | {"r": 257}),
    "rank 2^63": Upload("r", CONFIG | {"r": 1 << 63}),
    "no module": Upload("target_modules", CONFIG | {"target_modules": []}),
    "a module that is none": Upload("target_modules", CONFIG | {"target_modules": ["lm_head"]}),
    "an infinite alpha": Upload("lora_alpha", CONFIG | {"lora_alpha": 1e40}),
    "a pattern without end": Upload("target_modules", CONFIG | {"target_modules": "(" * 1000}),
    "a config of 65 KiB": Upload("config_json", CONFIG | {"revision": "x" * (65 << 10)}),
}


@pytest.mark.parametrize("name", UPLOADS)
async def test_an_adapter_that_cannot_be_served_is_refused(
    stack: GuardedStack, tmp_path: Path, name: str
) -> None:
    upload = UPLOADS[name]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text(json.dumps(upload.config))
    (bad / "adapter_model.safetensors").write_bytes(upload.weights())
    async with stack.client_of("red", Role.MANAGE) as client:
        async with refused(Refusal(AdapterInvalid, upload.field)):
            await client.adapters.push(bad)
        async with refused(Refusal(AdapterNotFound)):
            await client.adapters.show("bad")


async def test_a_directory_with_a_pickle_is_refused_before_anything_is_sent(
    stack: GuardedStack, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))
    async with stack.client_of("red", Role.MANAGE) as client:
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            await client.adapters.push(tmp_path, adapter_id="bad")


ANNOUNCED: dict[str, tuple[dict[str, Any], str]] = {
    "2^63 bytes": ({"weights_bytes": 1 << 63}, "weights_bytes"),
    "no bytes": ({"weights_bytes": 0}, "weights_bytes"),
    "a short digest": ({"weights_sha256": b"x"}, "weights_sha256"),
    "a path": ({"adapter_id": "../bad"}, "adapter_id"),
    "a config that is none": ({"config_json": "[" * 10_000}, "config_json"),
}


@pytest.mark.parametrize("name", ANNOUNCED)
async def test_an_upload_that_cannot_be_is_refused_when_it_is_announced(
    stack: GuardedStack, name: str
) -> None:
    fields, named = ANNOUNCED[name]
    valid: dict[str, Any] = {
        "adapter_id": "bad",
        "config_json": json.dumps(CONFIG),
        "weights_bytes": len(WEIGHTS),
        "weights_sha256": b"x" * 32,
    }
    request = adapter_service_pb2.CreateUploadRequest(**(valid | fields))
    async with grpc.aio.insecure_channel(stack.store.address) as channel:
        stub: Any = AdapterServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CreateUpload(request, metadata=bearer(token("red", Role.MANAGE)), timeout=60)
    error = from_rpc(caught.value)
    assert isinstance(error, InvalidRequest)
    assert [violation.field for violation in error.violations] == [named]


# Methods


def too_weak(path: str) -> Iterator[Role]:
    for role in Role:
        if role is not Role.ADMIN and role not in METHOD_ROLES[path]:
            yield role


@pytest.mark.parametrize("path", METHODS)
async def test_a_method_refuses_wrong_missing_and_weak_tokens(
    stack: GuardedStack, path: str
) -> None:
    """On the service where it really is."""
    async with grpc.aio.insecure_channel(method_address(stack, path)) as channel:
        for shown in (None, "guess", token("red", Role.INFER).upper()):
            async with refused(Refusal(Unauthenticated)):
                await METHODS[path].call(channel, shown)
        for role in too_weak(path):
            async with refused(Refusal(PermissionDenied, metadata={"method": path})):
                await METHODS[path].call(channel, token("red", role))


@pytest.mark.parametrize("path", METHODS)
async def test_bytes_that_are_no_message_are_their_callers_error(
    stack: GuardedStack, path: str
) -> None:
    method = METHODS[path]
    async with grpc.aio.insecure_channel(method_address(stack, path)) as channel:
        call = getattr(channel, method.kind)(path)  # of bytes
        garbage = b"\xff" * 50
        request = iter([garbage]) if method.kind.startswith("stream") else garbage
        answer = call(request, metadata=bearer(token("red", Role.ADMIN)), timeout=60)
        async with refused(Refusal(InvalidRequest)):
            await (answer.read() if method.kind.endswith("stream") else answer)


EMPTY_IS_VALID = {
    "/lorry.v1.CatalogueService/WatchCatalogue",
    "/lorry.v1.AdapterService/ListAdapters",
    "/lorry.v1.StoreAdminService/ListImports",
    "/lorry.v1.StoreAdminService/ListPins",
    "/lorry.v1.WorkerService/GetWorkerStatus",
    "/lorry.v1.WorkerAdminService/Drain",
}


@pytest.mark.parametrize("path", sorted(METHODS.keys() - EMPTY_IS_VALID))
async def test_an_empty_request_has_an_error_of_the_table(stack: GuardedStack, path: str) -> None:
    async with grpc.aio.insecure_channel(method_address(stack, path)) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await METHODS[path].call(channel, token("red", Role.ADMIN))
    error = from_rpc(caught.value)
    assert ERRORS[error.code, error.reason] is type(error)
    assert error.code is not grpc.StatusCode.INTERNAL
