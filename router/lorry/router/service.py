"""The InferenceService RPCs, translated to generations of the router."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import grpc.aio

from lorry.router.generation import Generation
from lorry.router.output import Output
from lorry.router.translation import SpecReader, to_chunk, to_completed, to_response
from lorry.rpc.identity import current_caller
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1.inference_service_pb2_grpc import InferenceServiceServicer

SERVICE = "lorry.v1.InferenceService"
Context = grpc.aio.ServicerContext[Any, Any]


class Generator(Protocol):
    def generate(
        self,
        generation: Generation,
        *,
        remaining_s: float | None,
        streaming: bool,
        when_client_left: Callable[[Callable[[], None]], None],
    ) -> AbstractAsyncContextManager[Output]: ...


class InferenceService(InferenceServiceServicer):
    def __init__(self, generator: Generator, reader: SpecReader) -> None:
        self._generator = generator
        self._reader = reader

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with self._open(request.spec, context, streaming=False) as output:
            chunk = await output.next_chunk()
            return to_response(chunk, output.completed)

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        async with self._open(request.spec, context, streaming=True) as output:
            while (chunk := await output.next_chunk()) is not None:
                yield to_chunk(chunk)
            yield pb.StreamGenerateResponse(completed=to_completed(output.completed))

    def _open(
        self, spec: pb.GenerationSpec, context: Context, *, streaming: bool
    ) -> AbstractAsyncContextManager[Output]:
        return self._generator.generate(
            self._reader.read(spec, tenant=current_caller().tenant),
            remaining_s=context.time_remaining(),
            streaming=streaming,
            when_client_left=lambda leave: context.add_done_callback(
                lambda _: leave()  # type: ignore[arg-type] # the stubs ask for a class here
            ),
        )
