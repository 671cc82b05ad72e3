"""The one `Attach` stream to a worker: translated, watched, and begun again when it ends."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import grpc
import grpc.aio

from lorry.router.actions import Prefetch, Submit
from lorry.router.dispatcher import Place
from lorry.router.generation import Logprobs, TokenLogprobs
from lorry.router.outbox import Outbox
from lorry.router.worker import Worker, WorkerStatus
from lorry.router.worker_messages import (
    Ended,
    to_ended,
    to_logprobs,
    to_prompt_logprobs,
    to_status,
    to_submit,
)
from lorry.rpc.backoff import Backoff
from lorry.rpc.channel import MIB, Channels
from lorry.rpc.errors import LorryError, ModelMismatch, NoWorker, WorkerLost
from lorry.rpc.protocol import PROTOCOL_REVISION
from lorry.rpc.repeated_log import RepeatedLog
from lorry.rpc.status import from_rpc
from lorry.v1 import worker_service_pb2 as pb
from lorry.v1.worker_service_pb2_grpc import WorkerServiceStub

AttachCall = grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]

log = logging.getLogger(__name__)


class WorkerEvents(Protocol):
    """Who hears what a worker says."""

    def worker_attached(self, worker: Worker) -> None: ...
    def worker_lost(self, worker: Worker) -> None: ...
    def worker_changed(self, worker: Worker) -> None: ...  # whether it takes requests
    def tokens_drawn(
        self,
        worker: Worker,
        seqs: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None,
    ) -> None: ...
    def prompt_logprobs_read(
        self, worker: Worker, seq: int, first_index: int, logprobs: Logprobs
    ) -> None: ...
    def requests_ended(self, worker: Worker, ended: Sequence[Ended]) -> None: ...
    def status_heard(self, worker: Worker, status: WorkerStatus) -> None: ...
    def submit_limit_raised(self, worker: Worker) -> None: ...


class WorkerLink:
    """`run` holds the stream until cancelled. Between streams what is sent is dropped.

    Whatever a worker sends, it costs that worker alone. Where the channels have TLS, the worker's
    certificate must be for `server_name`.
    """

    def __init__(
        self,
        address: str,
        events: WorkerEvents,
        *,
        router_id: str,
        model_digest: bytes,
        channels: Channels,
        server_name: str,
        silence_s: float,
    ) -> None:
        self._address = address
        self._events = events
        self._hello = pb.Hello(
            router_id=router_id, protocol_revision=PROTOCOL_REVISION, model_digest=model_digest
        )
        self._channels = channels
        self._server_name = server_name
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        self._worker: Worker | None = None  # while attached
        self._listed = True
        self._failures = RepeatedLog(log)

    @property
    def idle(self) -> bool:
        """Whether no request is at the worker."""
        return self._worker is None or not self._worker.load

    def set_listed(self, listed: bool) -> None:
        """Whether discovery knows the worker; if not, it gets no new requests."""
        self._listed = listed
        if self._worker is not None and self._worker.listed is not listed:
            self._worker.listed = listed
            self._events.worker_changed(self._worker)

    def submit(self, submit: Submit) -> None:
        self._outbox.submit(submit)

    def cancel(self, place: Place) -> None:
        self._outbox.cancel(place.seq)

    def prefetch(self, prefetch: Prefetch) -> None:
        self._outbox.prefetch(prefetch)

    async def run(self) -> None:
        """Attach again and again."""
        backoff = Backoff()
        async with self._channels.open(
            self._address, max_receive_bytes=16 * MIB, server_name=self._server_name
        ) as channel:
            while True:
                try:
                    await self._attach(channel, backoff.reset)
                except TimeoutError:
                    self._log(WorkerLost(f"silent for {self._silence_s:g} s"))
                except grpc.aio.AioRpcError as failure:
                    self._log(from_rpc(failure))
                except LorryError as error:
                    self._log(error)
                except Exception as error:  # of a message that does not fit together, or a defect
                    self._log_unexpected(error)
                await backoff.wait()

    def _log(self, error: LorryError) -> None:
        level = logging.WARNING
        if isinstance(error, ModelMismatch):
            level = logging.ERROR
        elif isinstance(error, NoWorker):  # it is still loading
            level = logging.INFO
        kind = error.reason or error.code.name
        self._failures.failed(kind, level, "worker %s: %s %s", self._address, kind, error)

    def _log_unexpected(self, error: Exception) -> None:
        kind = type(error).__name__
        message = "worker %s: what was sent on its stream cannot be taken: %s %s"
        self._failures.failed(
            kind, logging.ERROR, message, self._address, kind, error, traceback_of=error
        )

    async def _attach(self, channel: grpc.aio.Channel, attached: Callable[[], None]) -> None:
        """One stream, from Hello to its end."""
        self._outbox = Outbox()
        call = WorkerServiceStub(channel).Attach()
        # Given an iterator, gRPC would go on waiting for its next command after the stream's end.
        writer = asyncio.create_task(self._write(call, self._outbox))

        def stop_reading(writer: asyncio.Task[None]) -> None:
            if self._worker is not None and not writer.cancelled() and writer.exception():
                silence.reschedule(self._loop.time())

        try:
            async with asyncio.timeout(self._silence_s) as silence:
                writer.add_done_callback(stop_reading)
                worker = self._welcomed(await call.read())
                attached()
                self._failures.worked()
                log.info("worker %s attached, epoch %x", self._address, worker.epoch)
                self._worker = worker
                self._events.worker_attached(worker)
                try:
                    while isinstance(response := await call.read(), pb.AttachResponse):
                        silence.reschedule(self._loop.time() + self._silence_s)
                        self._receive(worker, response)
                    raise WorkerLost("the worker ended the stream")
                finally:
                    self._worker = None
                    self._events.worker_lost(worker)
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.wait([writer])
            if not writer.cancelled():
                writer.result()

    def _welcomed(self, response: object) -> Worker:
        if not isinstance(response, pb.AttachResponse):
            raise WorkerLost("the worker ended the stream before its Welcome")
        welcome = response.welcome
        if welcome.protocol_revision != PROTOCOL_REVISION:
            raise ModelMismatch(
                f"it speaks protocol revision {welcome.protocol_revision}, not {PROTOCOL_REVISION}"
            )
        if welcome.model_digest != self._hello.model_digest:
            raise ModelMismatch(
                f"its base model is {welcome.model_digest.hex()}, "
                f"the router's is {self._hello.model_digest.hex()}"
            )
        worker = Worker(
            name=self._address,
            epoch=welcome.epoch,
            max_context_tokens=welcome.max_context_tokens,
            max_rank=welcome.max_rank,
            submit_limit=welcome.submit_limit,
            draining=welcome.status.draining,
            max_running=welcome.max_running,
            step_tokens=welcome.step_tokens,
            listed=self._listed,
        )
        worker.hear(to_status(welcome.status))
        return worker

    def _receive(self, worker: Worker, response: pb.AttachResponse) -> None:
        event = response.WhichOneof("event")
        if event == "step":
            self._receive_step(worker, response.step)
        elif event == "prompt_logprobs":
            chunk = response.prompt_logprobs
            logprobs = to_prompt_logprobs(chunk.logprobs)
            self._events.prompt_logprobs_read(worker, chunk.seq, chunk.first_index, logprobs)
        elif event == "residency":
            residency = response.residency
            worker.update_residency(
                snapshot=residency.snapshot,
                gpu=(residency.gpu_added, residency.gpu_removed),
                host=(residency.host_added, residency.host_removed),
            )
        elif event == "status":
            self._receive_status(worker, response.status)

    def _receive_status(self, worker: Worker, status: pb.WorkerStatus) -> None:
        self._events.status_heard(worker, to_status(status))
        if status.draining and not worker.draining:
            log.info("worker %s is draining", self._address)
            worker.draining = True
            self._events.worker_changed(worker)

    def _receive_step(self, worker: Worker, step: pb.StepOutput) -> None:
        self._events.tokens_drawn(worker, step.seqs, step.token_ids, to_logprobs(step))
        if step.finished:
            self._events.requests_ended(worker, [to_ended(f) for f in step.finished])
        if step.submit_limit > worker.submit_limit:
            worker.raise_submit_limit(step.submit_limit)
            self._events.submit_limit_raised(worker)

    async def _write(self, call: AttachCall, outbox: Outbox) -> None:
        """Until cancelled, or the stream ends: then the reader knows why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.AttachRequest(hello=self._hello))
            while True:
                submits, cancels, prefetch = await outbox.take()
                for submit in submits:
                    message = to_submit(submit.seq, submit.request, self._loop.time())
                    await call.write(pb.AttachRequest(submit=message))
                if cancels:
                    await call.write(pb.AttachRequest(cancel=pb.Cancel(seqs=cancels)))
                if prefetch is not None:
                    wanted = pb.Prefetch(versions=prefetch.versions)
                    await call.write(pb.AttachRequest(prefetch=wanted))
