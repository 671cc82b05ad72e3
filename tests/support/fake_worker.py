"""A real WorkerService that computes nothing: it answers as a test says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from lorry.rpc.errors import LorryError, ModelMismatch
from lorry.rpc.identity import Authenticator
from lorry.rpc.protocol import PROTOCOL_REVISION
from lorry.rpc.server import serving
from lorry.rpc.status import to_status
from lorry.v1 import common_pb2
from lorry.v1 import worker_service_pb2 as pb
from lorry.v1.worker_service_pb2_grpc import (
    WorkerServiceServicer,
    add_WorkerServiceServicer_to_server,
)

SERVICE = "lorry.v1.WorkerService"
Reason = Any  # a FinishReason; an enum's values have a type in the stubs only
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
ABORTED, CANCELLED = common_pb2.FINISH_REASON_ABORTED, common_pb2.FINISH_REASON_CANCELLED


@dataclass(frozen=True)
class Reply:
    """The whole output of a request, one token a step, then its end; no reason: it goes on."""

    token_ids: Sequence[int] = ()
    reason: Reason = LENGTH
    error: LorryError | None = None


class FakeWorker(WorkerServiceServicer):
    """`reply` tells the output of each Submit; None leaves it to the test, by `draw` and `finish`.

    A Submit that resumes gets what follows its generated tokens.
    """

    def __init__(
        self,
        model_digest: bytes,
        *,
        reply: Callable[[pb.Submit], Reply | None] = lambda submit: None,
        submit_limit: int = 1000,
        max_context_tokens: int = 512,
        max_rank: int = 64,
        max_running: int = 0,
        step_tokens: int = 0,
        heartbeat_s: float = 0.1,
        failure: LorryError | None = None,
    ) -> None:
        self.model_digest = model_digest
        self.reply = reply
        self.submit_limit = submit_limit
        self.max_context_tokens = max_context_tokens
        self.max_rank = max_rank
        self.max_running = max_running
        self.step_tokens = step_tokens
        self.heartbeat_s = heartbeat_s
        self.failure = failure  # that every Attach ends with
        self.accepts_any_model = False
        self.silent = False
        self.draining = False
        self.hellos: list[pb.Hello] = []
        self.tokens: set[str] = set()  # that routers have shown
        self.submits: list[pb.Submit] = []
        self.cancels: list[int] = []
        self.prefetches: list[list[bytes]] = []
        self.active: dict[int, pb.Submit] = {}  # of the stream now
        self.host = "127.0.0.1"
        self.port = 0
        self._out: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue()
        self._heard = asyncio.Condition()
        self._num_steps = 0

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator["FakeWorker"]:
        def register(server: grpc.aio.Server) -> None:
            add_WorkerServiceServicer_to_server(self, server)

        async with serving(
            register,
            services=[SERVICE],
            address=f"{host}:{port}",
            authenticator=Authenticator(),
            grace_s=0,
        ) as server:
            self.host, self.port = host, server.port
            yield self

    async def Attach(
        self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.AttachResponse]:
        hello = (await anext(aiter(request_iterator))).hello
        self.hellos.append(hello)
        self.tokens |= {
            str(v) for k, v in context.invocation_metadata() or () if k == "authorization"
        }
        if self.failure is not None:
            raise self.failure
        if hello.model_digest != self.model_digest and not self.accepts_any_model:
            raise ModelMismatch("the router serves another base model")
        self._out, self.active = asyncio.Queue(), {}
        yield self._welcome()
        out = self._out
        helpers = [
            asyncio.create_task(self._listen(request_iterator)),
            asyncio.create_task(self._beat()),
        ]
        for helper in helpers:
            _cancel_with(context, helper)
        while (response := await out.get()) is not None:
            yield response

    async def GetWorkerStatus(
        self, request: pb.GetWorkerStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetWorkerStatusResponse:
        return pb.GetWorkerStatusResponse(worker_id="fake", epoch=1)

    def send(self, response: pb.AttachResponse) -> None:
        self._out.put_nowait(response)

    def draw(self, seq: int, *token_ids: int, **step: Any) -> None:
        """One step that draws tokens of one request."""
        self.step(seqs=[seq] * len(token_ids), token_ids=token_ids, **step)

    def report_prompt(self, seq: int, first_index: int, *logprobs: float) -> None:
        """Logprobs of prompt tokens; the one alternative of each is token 9."""
        rows = common_pb2.Logprobs(
            logprobs=logprobs,
            top_counts=[1] * len(logprobs),
            top_token_ids=[9] * len(logprobs),
            top_logprobs=[-0.5] * len(logprobs),
        )
        chunk = pb.PromptLogprobChunk(seq=seq, first_index=first_index, logprobs=rows)
        self.send(pb.AttachResponse(prompt_logprobs=chunk))

    def step(self, **fields: Any) -> None:
        self._num_steps += 1
        self.send(pb.AttachResponse(step=pb.StepOutput(step=self._num_steps, **fields)))

    def finish(self, seq: int, reason: Reason, error: LorryError | None = None) -> None:
        del self.active[seq]
        finished = pb.Finished(seq=seq, reason=reason)
        if error is not None:
            finished.error.CopyFrom(to_status(error))
        finished.usage.cached_tokens = 1
        finished.adapter_load.FromMilliseconds(20)
        finished.prefill.FromMilliseconds(30)
        self.step(finished=[finished])

    def raise_submit_limit(self, limit: int) -> None:
        self.submit_limit = limit
        self.step(submit_limit=limit)

    def end_stream(self) -> None:
        self._out.put_nowait(None)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until what was heard makes `holds` true."""
        async with asyncio.timeout(10), self._heard:
            await self._heard.wait_for(holds)

    def _welcome(self) -> pb.AttachResponse:
        welcome = pb.Welcome(
            worker_id="fake",
            epoch=1,
            protocol_revision=PROTOCOL_REVISION,
            model_digest=self.model_digest,
            max_context_tokens=self.max_context_tokens,
            max_rank=self.max_rank,
            submit_limit=self.submit_limit,
            max_running=self.max_running,
            step_tokens=self.step_tokens,
        )
        return pb.AttachResponse(welcome=welcome)

    async def _listen(self, request_iterator: Any) -> None:
        async for request in request_iterator:
            async with self._heard:
                self._hear(request)
                self._heard.notify_all()
        self.end_stream()

    def _hear(self, request: pb.AttachRequest) -> None:
        kind = request.WhichOneof("command")
        if kind == "submit":
            self.submits.append(request.submit)
            self.active[request.submit.seq] = request.submit
            self._answer(request.submit)
        elif kind == "cancel":
            self.cancels += request.cancel.seqs
            for seq in request.cancel.seqs:
                if seq in self.active:
                    self.finish(seq, CANCELLED)
        elif kind == "prefetch":
            self.prefetches.append(list(request.prefetch.versions))

    def _answer(self, submit: pb.Submit) -> None:
        reply = self.reply(submit)
        if reply is None:
            return
        for token_id in reply.token_ids[submit.generated_tokens :]:
            self.draw(submit.seq, token_id)
        if reply.reason is not None:
            self.finish(submit.seq, reply.reason, reply.error)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat_s)
            if not self.silent:
                self.send(pb.AttachResponse(status=pb.WorkerStatus(draining=self.draining)))


def _cancel_with(context: Any, task: asyncio.Task[None]) -> None:
    """Cancel the task when the call ends, which may never resume its generator."""
    context.add_done_callback(lambda _: task.cancel())
