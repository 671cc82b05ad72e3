"""A real router between a fake worker and a fake store, all in this process over real gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.router.config import Config
from lorry.router.discovery import Resolve, resolve_host
from lorry.router.lifetime import Running, running
from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import LorryError
from lorry.rpc.status import from_rpc
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import FakeWorker, Reply


@dataclass
class Answer:
    """What one StreamGenerate sent."""

    chunks: list[pb.TokenChunk]
    completed: pb.Completed | None = None
    prompt_logprobs: list[pb.PromptLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]


@dataclass
class Stack:
    running: Running
    workers: Sequence[FakeWorker]
    store: FakeStore
    channel: grpc.aio.Channel
    servers: Sequence[contextlib.AsyncExitStack] = ()  # of the workers

    async def stop_worker(self) -> None:
        """End the first worker's process, as far as the router can tell."""
        await self.servers[0].aclose()

    @property
    def worker(self) -> FakeWorker:
        return self.workers[0]

    @property
    def stub(self) -> Any:
        return InferenceServiceStub(self.channel)

    def open(self, spec: pb.GenerationSpec, timeout_s: float | None = 20) -> Any:
        """Begin a StreamGenerate; the time-out only guards against hanging."""
        return self.stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec), timeout=timeout_s)

    async def stream(self, spec: pb.GenerationSpec) -> Answer:
        """A whole StreamGenerate; raises the LorryError that ended it."""
        return await read_answer(self.open(spec))

    async def generate(self, spec: pb.GenerationSpec) -> pb.GenerateResponse:
        try:
            response: pb.GenerateResponse = await self.stub.Generate(
                pb.GenerateRequest(spec=spec), timeout=20
            )
            return response
        except grpc.aio.AioRpcError as failure:
            raise from_rpc(failure) from failure

    @property
    def nums_sent(self) -> list[int]:
        """Tokens that the client of each active request has taken."""
        active = self.running.router._active
        return [active.output(request).num_sent for request in active]

    async def until_health(self, *, ready: bool) -> None:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        wanted = health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(20):
            call = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))
            async for response in call:
                if (response.status == wanted) is ready:
                    call.cancel()
                    return

    def check_idle(self) -> None:
        """Every request has freed what it held."""
        dispatcher = self.running.router._dispatcher
        dispatcher.check_integrity()
        assert not dispatcher.requests
        assert not self.running.router._active


async def read_answer(call: Any) -> Answer:
    answer = Answer([])
    try:
        async for response in call:
            if response.HasField("chunk"):
                answer.chunks.append(response.chunk)
            elif response.HasField("prompt_logprobs"):
                assert not answer.chunks, "logprobs of a prompt after a chunk"
                answer.prompt_logprobs.append(response.prompt_logprobs)
            else:
                answer.completed = response.completed
    except grpc.aio.AioRpcError as failure:
        raise from_rpc(failure) from failure
    return answer


async def error_of(awaitable: Any) -> LorryError:
    """The error that it ends with."""
    try:
        result = await awaitable
    except LorryError as error:
        return error
    raise AssertionError(f"it ended well: {result}")


@contextlib.asynccontextmanager
async def router_stack(
    model: Path,
    *,
    reply: Callable[[Any], Reply | None] = lambda submit: None,
    num_workers: int = 1,
    worker: dict[str, Any] | None = None,
    store: FakeStore | None = None,
    wait: bool = True,
    targets: tuple[str, ...] = (),
    resolve: Resolve = resolve_host,
    **config: Any,
) -> AsyncIterator[Stack]:
    """`reply` and `worker` are FakeWorker's arguments, `config` the router's options.

    `targets` tell the router of other workers than these.
    """
    digest = read_base_model(model).digest
    options: dict[str, Any] = {"reply": reply, "model_digest": digest} | (worker or {})
    store = store or FakeStore()
    async with contextlib.AsyncExitStack() as stack:
        workers = [FakeWorker(**options) for _ in range(num_workers)]
        servers = [await stack.enter_async_context(contextlib.AsyncExitStack()) for _ in workers]
        for fake, server in zip(workers, servers, strict=True):
            await server.enter_async_context(fake.serving())
        await stack.enter_async_context(store.serving())
        whole = Config(
            model=model,
            address="127.0.0.1:0",
            store=store.address,
            worker=targets or tuple(worker.address for worker in workers),
            **{"grace_s": 5.0, "worker_wait_s": 0.5, **config},
        )
        up = await stack.enter_async_context(running(whole, resolve=resolve))
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{up.server.port}")
        await stack.enter_async_context(channel)
        built = Stack(up, workers, store, channel, servers)
        if wait:
            await built.until_health(ready=True)
        yield built
