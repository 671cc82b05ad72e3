"""The router's end of one Attach, for tests of workers."""

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.rpc.errors import LorryError
from lorry.rpc.protocol import PROTOCOL_REVISION
from lorry.rpc.status import from_rpc
from lorry.v1 import worker_service_pb2 as pb
from lorry.v1.worker_service_pb2_grpc import WorkerServiceStub

TIMEOUT_S = 90.0  # guards against hanging


class AttachedRouter:
    """Sends commands and keeps everything that comes back."""

    def __init__(self, call: Any) -> None:
        self.welcome = pb.Welcome()
        self.steps: list[pb.StepOutput] = []
        self.statuses: list[pb.WorkerStatus] = []
        self.residencies: list[pb.Residency] = []
        self.prompt_chunks: list[pb.PromptLogprobChunk] = []
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.finished: dict[int, pb.Finished] = {}
        self.submit_limit = 0
        self.error: LorryError | None = None  # that the stream ended with
        self.ended = False
        self._call = call
        self._seqs = itertools.count(1)
        self._changed = asyncio.Event()

    async def submit(self, token_ids: list[int], *, seq: int | None = None, **fields: Any) -> int:
        """Send a greedy request of 3 tokens; returns its seq."""
        number = next(self._seqs) if seq is None else seq
        defaults: dict[str, Any] = {"tenant": "default", "max_tokens": 3}
        message = pb.Submit(seq=number, token_ids=token_ids, **(defaults | fields))
        if not message.HasField("sampling"):
            message.sampling.temperature, message.sampling.seed = 0.0, 1
        await self._call.write(pb.AttachRequest(submit=message))
        return number

    async def cancel(self, *seqs: int) -> None:
        await self._call.write(pb.AttachRequest(cancel=pb.Cancel(seqs=seqs)))

    async def prefetch(self, *versions: bytes) -> None:
        await self._call.write(pb.AttachRequest(prefetch=pb.Prefetch(versions=versions)))

    async def generate(self, token_ids: list[int], **fields: Any) -> pb.Finished:
        """Submit and wait for the end."""
        seq = await self.submit(token_ids, **fields)
        await self.until(lambda: seq in self.finished)
        return self.finished[seq]

    async def half_close(self) -> None:
        await self._call.done_writing()

    @property
    def last_status(self) -> pb.WorkerStatus:
        return self.statuses[-1] if self.statuses else self.welcome.status

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what came back fulfils the condition."""
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                if self.ended:
                    raise AssertionError(f"the stream ended with {self.error!r}")
                self._changed.clear()
                await self._changed.wait()

    async def until_ended(self) -> LorryError | None:
        async with asyncio.timeout(TIMEOUT_S):
            while not self.ended:
                self._changed.clear()
                await self._changed.wait()
        return self.error

    async def read(self) -> None:
        """Keep what comes until the stream ends."""
        try:
            async for response in self._call:
                self._note(response)
                self._changed.set()
        except grpc.RpcError as error:
            self.error = from_rpc(error)
        self.ended = True
        self._changed.set()

    def _note(self, response: pb.AttachResponse) -> None:
        match response.WhichOneof("event"):
            case "welcome":
                self.welcome = response.welcome
                self.submit_limit = response.welcome.submit_limit
            case "status":
                self.statuses.append(response.status)
            case "residency":
                self.residencies.append(response.residency)
            case "prompt_logprobs":
                assert not self.tokens[response.prompt_logprobs.seq], "after a token"
                self.prompt_chunks.append(response.prompt_logprobs)
            case "step":
                self._note_step(response.step)

    def _note_step(self, step: pb.StepOutput) -> None:
        self.steps.append(step)
        self.submit_limit = max(self.submit_limit, step.submit_limit)
        for seq, token_id in zip(step.seqs, step.token_ids, strict=True):
            assert seq not in self.finished, f"a token of {seq} after its end"
            self.tokens[seq].append(token_id)
        for finished in step.finished:
            assert finished.seq not in self.finished, f"{finished.seq} ended twice"
            self.finished[finished.seq] = finished


def worker_stub(channel: grpc.aio.Channel) -> Any:
    """Untyped, because the checkers disagree on what stubs return."""
    return WorkerServiceStub(channel)


async def until_ready(channel: grpc.aio.Channel) -> None:
    """Wait until a worker's health says that it can be used."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="readiness")
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            answer = await stub.Check(request, wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def attached_router(
    channel: grpc.aio.Channel, router_id: str, *, welcomed: bool = True, **hello: Any
) -> AsyncIterator[AttachedRouter]:
    """A stream that is cancelled on exit."""
    call = worker_stub(channel).Attach()
    defaults: dict[str, Any] = {"protocol_revision": PROTOCOL_REVISION}
    message = pb.Hello(router_id=router_id, **(defaults | hello))
    with contextlib.suppress(grpc.aio.AioRpcError):  # an end at once is for the reader, too
        await call.write(pb.AttachRequest(hello=message))
    router = AttachedRouter(call)
    reading = asyncio.create_task(router.read())
    try:
        if welcomed:
            await router.until(lambda: router.submit_limit > 0)
        yield router
    finally:
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
