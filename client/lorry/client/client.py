"""The asynchronous client of a router and its adapter store."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import grpc.aio

from lorry.client.adapters import Adapters
from lorry.client.generation import (
    Chunk,
    Completion,
    Generation,
    Request,
    TokenLogprobs,
    read_prompt_logprobs,
)
from lorry.client.retry import RetryPolicy, typed
from lorry.client.routers import Call, Routers
from lorry.client.store_admin import StoreAdmin
from lorry.rpc.channel import Credentials, open_channel
from lorry.v1 import inference_service_pb2 as pb

if TYPE_CHECKING:
    from lorry.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub as AsyncStub

DEFAULT_ROUTER = "127.0.0.1:50051"
DEFAULT_STORE = "127.0.0.1:50052"
T = TypeVar("T")
StreamCall = grpc.aio.UnaryStreamCall[Any, pb.StreamGenerateResponse]


class Client:
    """Generates text and manages adapters; use it as an asynchronous context manager.

    Failures are the classes of `lorry.rpc.errors`. UNAVAILABLE, and the CANCELLED of a
    server that ended, are retried, but never after a generation's first token, so no token comes
    twice.
    """

    def __init__(
        self,
        *,
        router: str = DEFAULT_ROUTER,
        store: str = DEFAULT_STORE,
        token: str | None = None,
        token_file: Path | None = None,
        tls: Path | None = None,
        timeout_s: float = 300.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        """`router` and `store` are HOST:PORT; `timeout_s` bounds each call with its retries.

        `router` may also be several, separated by commas: what the first does not take, since it
        is gone or about to go, the next one is asked, and the one that answered stays the first.

        The bearer token is `token`, or what `token_file` holds at the time. `tls` is a directory
        with ca.crt, which must have signed the services' certificates, and tls.crt and tls.key
        where they ask for one; without it connections are in plain text.
        """
        credentials = Credentials(token=token, token_file=token_file, tls=tls)
        self._routers = Routers(router, credentials)
        self._store = open_channel(store, credentials)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self.adapters = Adapters(
            store,
            self._store,
            credentials=credentials,
            timeout_s=timeout_s,
            retry=self._retry,
        )
        self.store_admin = StoreAdmin(self._store, timeout_s=timeout_s, retry=self._retry)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End what still runs and close the connections."""
        await self._routers.close()
        await self._store.close()

    async def generate(self, request: Request, *, timeout_s: float | None = None) -> Generation:
        """The whole answer at once."""
        message = pb.GenerateRequest(spec=request.to_proto())

        async def call(router: "AsyncStub", remaining_s: float) -> pb.GenerateResponse:
            return await router.Generate(message, timeout=remaining_s)

        response = await self._ask(call, timeout_s)
        return Generation.from_proto(response)

    @contextlib.asynccontextmanager
    async def stream(
        self, request: Request, *, timeout_s: float | None = None
    ) -> AsyncIterator["GenerationStream"]:
        """The answer as it comes; entering waits for its beginning, leaving cancels the rest."""
        message = pb.StreamGenerateRequest(spec=request.to_proto())

        async def call(router: "AsyncStub", remaining_s: float) -> GenerationStream:
            stream = GenerationStream(router.StreamGenerate(message, timeout=remaining_s))
            await stream.begin()
            return stream

        stream = await self._ask(call, timeout_s)
        try:
            yield stream
        finally:
            stream.cancel()

    async def _ask(self, call: Call[T], timeout_s: float | None) -> T:
        return await self._routers.ask(
            call, policy=self._retry, timeout_s=timeout_s or self._timeout_s
        )


class GenerationStream:
    """Chunks of one generation; `completion` is set when they have all come.

    `prompt_logprobs` are those of the prompt's second token on, complete before the first chunk.
    """

    def __init__(self, call: StreamCall) -> None:
        self._call = call
        self._first: pb.StreamGenerateResponse | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.completion: Completion | None = None

    async def begin(self) -> None:
        """Wait for the first message; raises grpc.RpcError, and then nothing is left running."""
        try:
            self._first = await self._read()
        except BaseException:
            self._call.cancel()
            raise

    def cancel(self) -> None:
        self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        try:
            while (message := await self._next()) is not None:
                if message.HasField("chunk"):
                    return Chunk.from_proto(message.chunk)
                self.prompt_logprobs += read_prompt_logprobs(message.prompt_logprobs)
                if message.HasField("completed"):
                    self.completion = Completion.from_proto(message.completed)
        except grpc.RpcError as error:
            raise typed(error) from error
        raise StopAsyncIteration

    async def _next(self) -> pb.StreamGenerateResponse | None:
        if self._first is None:
            return await self._read()
        message, self._first = self._first, None
        return message

    async def _read(self) -> pb.StreamGenerateResponse | None:
        message = await self._call.read()
        return message if isinstance(message, pb.StreamGenerateResponse) else None  # else EOF
