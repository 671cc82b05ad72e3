"""Small real gRPC services that do as they are told, for tests of what calls them."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any, Literal

import grpc.aio
from crc32c import crc32c

from lorry.rpc.errors import (
    AdapterExists,
    AdapterNotFound,
    DigestMismatch,
    EtagMismatch,
    LorryError,
    OffsetMismatch,
)
from lorry.rpc.identity import Authenticator
from lorry.rpc.server import serving
from lorry.v1 import adapter_service_pb2, common_pb2, inference_service_pb2
from lorry.v1.adapter_service_pb2_grpc import (
    AdapterServiceServicer,
    add_AdapterServiceServicer_to_server,
)
from lorry.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)

ADAPTER_SERVICE = "lorry.v1.AdapterService"
INFERENCE_SERVICE = "lorry.v1.InferenceService"


@contextlib.asynccontextmanager
async def serving_scripted(
    *,
    inference: "ScriptedInference | None" = None,
    adapters: "ScriptedAdapters | None" = None,
    authenticator: Authenticator | None = None,
    ready: bool = True,
) -> AsyncIterator[str]:
    """The address of a server with the given services."""

    def register(server: grpc.aio.Server) -> None:
        if inference is not None:
            add_InferenceServiceServicer_to_server(inference, server)
        if adapters is not None:
            add_AdapterServiceServicer_to_server(adapters, server)

    async with serving(
        register,
        services=[INFERENCE_SERVICE, ADAPTER_SERVICE],
        address="127.0.0.1:0",
        authenticator=authenticator or Authenticator(),
        grace_s=0,
    ) as server:
        await server.set_ready(ready)
        yield f"127.0.0.1:{server.port}"


class Script:
    """Errors to raise, one for each call, before calls succeed."""

    def __init__(self, *failures: Exception) -> None:
        self.calls = 0
        self._failures = list(failures)

    def fail_next(self, failure: Exception) -> None:
        self._failures.append(failure)

    def step(self) -> None:
        self.calls += 1
        if self._failures:
            raise self._failures.pop(0)


class ScriptedInference(InferenceServiceServicer):
    """Answers with the prompt's words, one token each; tokens with as many as were asked for."""

    def __init__(
        self,
        *failures: Exception,
        break_after: int | None = None,
        pause_after: int | None = None,
    ) -> None:
        """After so many chunks a stream ends UNAVAILABLE, or sends no more."""
        self.script = Script(*failures)
        self.specs: list[inference_service_pb2.GenerationSpec] = []
        self.ended = asyncio.Event()  # a stream has ended, however
        self._break_after = break_after
        self._pause_after = pause_after

    async def Generate(
        self, request: inference_service_pb2.GenerateRequest, context: Any
    ) -> inference_service_pb2.GenerateResponse:
        self.specs.append(request.spec)
        self.script.step()
        words = _words(request.spec)
        return inference_service_pb2.GenerateResponse(
            text="".join(words),
            token_ids=range(len(words)),
            logprobs=_logprobs(request.spec.response, "top_logprobs", len(words)),
            prompt_logprobs=_prompt_logprobs(request.spec),
            completed=_completed(request.spec),
        )

    async def StreamGenerate(
        self, request: inference_service_pb2.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[inference_service_pb2.StreamGenerateResponse]:
        self.specs.append(request.spec)
        context.add_done_callback(lambda _: self.ended.set())
        self.script.step()
        if (prompt := _prompt_logprobs(request.spec)) is not None:
            yield inference_service_pb2.StreamGenerateResponse(prompt_logprobs=prompt)
        for index, word in enumerate(_words(request.spec)):
            if index == self._break_after:
                raise _Broken("the connection broke")
            if index == self._pause_after:
                await asyncio.Event().wait()
            chunk = inference_service_pb2.TokenChunk(
                token_ids=[index],
                text=word,
                logprobs=_logprobs(request.spec.response, "top_logprobs", 1),
            )
            yield inference_service_pb2.StreamGenerateResponse(chunk=chunk)
            await asyncio.sleep(0)
        completed = _completed(request.spec)
        yield inference_service_pb2.StreamGenerateResponse(completed=completed)


def _words(spec: inference_service_pb2.GenerationSpec) -> list[str]:
    return spec.prompt.split() or ["x"] * spec.stopping.max_tokens


def _prompt_logprobs(
    spec: inference_service_pb2.GenerationSpec,
) -> inference_service_pb2.PromptLogprobs | None:
    """Each word of the prompt is token 9."""
    num_tokens = len(spec.prompt.split()) - 1
    logprobs = _logprobs(spec.response, "prompt_logprobs", num_tokens)
    if logprobs is None:
        return None
    return inference_service_pb2.PromptLogprobs(
        first_index=1, token_ids=[9] * num_tokens, logprobs=logprobs
    )


def _logprobs(
    response: common_pb2.ResponseOptions,
    field: Literal["top_logprobs", "prompt_logprobs"],
    num_tokens: int,
) -> common_pb2.Logprobs | None:
    """Where asked for; the alternatives of every token are 70, 71, ..."""
    if not response.HasField(field):
        return None
    count: int = getattr(response, field)
    return common_pb2.Logprobs(
        logprobs=[-0.5] * num_tokens,
        top_counts=[count] * num_tokens if count else [],
        top_token_ids=[70 + place for _ in range(num_tokens) for place in range(count)],
        top_logprobs=[-0.25 - place for _ in range(num_tokens) for place in range(count)],
    )


class ScriptedAdapters(AdapterServiceServicer):
    """A store in memory that checks what an upload promises; its adapters are of rank 8."""

    def __init__(self, *failures: Exception, break_at_byte: int | None = None) -> None:
        """The first upload ends UNAVAILABLE once `break_at_byte` has been received."""
        self.script = Script(*failures)
        self.adapters: dict[str, adapter_service_pb2.Adapter] = {}
        self.versions: list[adapter_service_pb2.AdapterVersion] = []  # of all names, newest first
        self.received = bytearray()
        self.offsets: list[int] = []  # where each upload stream has begun
        self._created = adapter_service_pb2.CreateUploadRequest()
        self._break_at_byte = break_at_byte
        self._change_of_others: adapter_service_pb2.Adapter | None = None

    def lose_next_update(self, change_of_others: adapter_service_pb2.Adapter) -> None:
        """End it UNAVAILABLE once it has been made, and then that of somebody else."""
        self._change_of_others = change_of_others

    async def GetAdapter(
        self, request: adapter_service_pb2.GetAdapterRequest, context: Any
    ) -> adapter_service_pb2.GetAdapterResponse:
        self.script.step()
        return adapter_service_pb2.GetAdapterResponse(adapter=self._find(request.name))

    async def ListAdapters(
        self, request: adapter_service_pb2.ListAdaptersRequest, context: Any
    ) -> adapter_service_pb2.ListAdaptersResponse:
        self.script.step()
        names = sorted(self.adapters)
        begin = int(request.page_token or 0)
        end = begin + request.page_size
        return adapter_service_pb2.ListAdaptersResponse(
            adapters=[self.adapters[name] for name in names[begin:end]],
            next_page_token=str(end) if end < len(names) else "",
        )

    async def DeleteAdapter(
        self, request: adapter_service_pb2.DeleteAdapterRequest, context: Any
    ) -> adapter_service_pb2.DeleteAdapterResponse:
        """Deletes first and fails then, as when the answer is lost."""
        if not request.allow_missing:
            self._find(request.name)
        self.adapters.pop(_full_name(request.name), None)
        self.script.step()
        return adapter_service_pb2.DeleteAdapterResponse()

    async def CreateUpload(
        self, request: adapter_service_pb2.CreateUploadRequest, context: Any
    ) -> adapter_service_pb2.CreateUploadResponse:
        self.script.step()
        known = self.adapters.get(_full_name(f"adapters/{request.adapter_id}"))
        if known is not None and known.etag != request.expected_etag:
            raise AdapterExists(f"adapter {known.name!r} exists")
        self._created.CopyFrom(request)
        self.received.clear()
        return adapter_service_pb2.CreateUploadResponse(upload_id="upload-1")

    async def UpdateAdapter(
        self, request: adapter_service_pb2.UpdateAdapterRequest, context: Any
    ) -> adapter_service_pb2.UpdateAdapterResponse:
        """Changes what the mask names; the answer is lost if `lose_next_update` says so."""
        self.script.step()
        adapter = self._find(request.adapter.name)
        if adapter.etag != request.adapter.etag:
            raise EtagMismatch(f"{adapter.name} has etag {adapter.etag!r}")
        request.update_mask.MergeMessage(request.adapter, adapter, replace_repeated_field=True)
        adapter.etag += "+"
        if self._change_of_others is not None:
            adapter.MergeFrom(self._change_of_others)
            self._change_of_others = None
            raise _Broken("the connection broke")
        return adapter_service_pb2.UpdateAdapterResponse(adapter=adapter)

    async def ListAdapterVersions(
        self, request: adapter_service_pb2.ListAdapterVersionsRequest, context: Any
    ) -> adapter_service_pb2.ListAdapterVersionsResponse:
        self._find(request.name)
        return adapter_service_pb2.ListAdapterVersionsResponse(versions=self.versions)

    async def GetUpload(
        self, request: adapter_service_pb2.GetUploadRequest, context: Any
    ) -> adapter_service_pb2.GetUploadResponse:
        return adapter_service_pb2.GetUploadResponse(received_bytes=len(self.received))

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapter_service_pb2.UploadAdapterRequest],
        context: Any,
    ) -> adapter_service_pb2.UploadAdapterResponse:
        async for request in request_iterator:
            if request.HasField("start"):
                self.offsets.append(request.start.offset)
            else:
                self._receive(request.chunk)
        if hashlib.sha256(self.received).digest() != self._created.weights_sha256:
            raise DigestMismatch("sha256")
        return adapter_service_pb2.UploadAdapterResponse(adapter=self._publish())

    def _receive(self, chunk: common_pb2.WeightChunk) -> None:
        if chunk.offset != len(self.received):
            raise OffsetMismatch(f"{len(self.received)} bytes are here, not {chunk.offset}")
        if crc32c(chunk.data) != chunk.crc32c:
            raise DigestMismatch("crc32c")
        self.received += chunk.data
        if self._break_at_byte is not None and len(self.received) >= self._break_at_byte:
            self._break_at_byte = None
            raise _Broken("the connection broke")

    def _publish(self) -> adapter_service_pb2.Adapter:
        version = hashlib.sha256(self.received).digest()
        adapter = adapter_service_pb2.Adapter(
            name=_full_name(f"adapters/{self._created.adapter_id}"),
            version=version,
            labels=self._created.labels,
            etag=version.hex()[:8],
        )
        adapter.published.digest = version
        adapter.published.max_rank = 8
        adapter.published.weights_sha256 = self._created.weights_sha256
        adapter.published.config_sha256 = hashlib.sha256(
            self._created.config_json.encode()
        ).digest()
        self.versions.insert(0, adapter.published)
        self.adapters[adapter.name] = adapter
        return adapter

    def _find(self, name: str) -> adapter_service_pb2.Adapter:
        try:
            return self.adapters[_full_name(name)]
        except KeyError:
            raise AdapterNotFound(f"adapter {name!r} is not registered") from None


class _Broken(LorryError):
    """What gRPC reports when a connection is lost: UNAVAILABLE, with no reason of the server's."""

    code, reason = grpc.StatusCode.UNAVAILABLE, "CONNECTION_BROKEN"


def _full_name(name: str) -> str:
    return name if name.startswith("tenants/") else f"tenants/default/{name}"


def _completed(spec: inference_service_pb2.GenerationSpec) -> inference_service_pb2.Completed:
    count = len(spec.prompt.split())
    return inference_service_pb2.Completed(
        request_id=spec.request_id,
        finish_reason=common_pb2.FINISH_REASON_STOP,
        stop_token_id=2,
        usage=common_pb2.Usage(prompt_tokens=count, completion_tokens=count),
        adapter=_full_name(spec.adapter) if spec.adapter else "",
    )
