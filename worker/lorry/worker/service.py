"""The worker's gRPC services; each method only translates."""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio

from lorry.rpc.base_model import BaseModel
from lorry.rpc.durations import to_seconds
from lorry.rpc.errors import InvalidRequest, LorryError, ModelMismatch
from lorry.rpc.names import SHA256_BYTES, check_sha256
from lorry.rpc.protocol import PROTOCOL_REVISION
from lorry.v1 import worker_admin_service_pb2 as admin_pb
from lorry.v1 import worker_service_pb2 as pb
from lorry.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceServicer
from lorry.v1.worker_service_pb2_grpc import WorkerServiceServicer
from lorry.worker.front import Front
from lorry.worker.messages import Started
from lorry.worker.responses import to_residency, to_response, to_worker_status
from lorry.worker.streams import RouterStream
from lorry.worker.submission import RequestLimits, to_submit

SERVICES = ("lorry.v1.WorkerService", "lorry.v1.WorkerAdminService")
HELLO_TIMEOUT_S = 10.0
MAX_ROUTER_ID_CHARS = 128
MAX_GRACE_S = 86_400.0
Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[pb.AttachRequest]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What routers are told of this worker."""

    worker_id: str
    epoch: int
    base_model: BaseModel


class WorkerServicer(WorkerServiceServicer):
    def __init__(self, front: Front, identity: Identity) -> None:
        self._front = front
        self._identity = identity

    async def Attach(
        self, request_iterator: Requests, context: Any
    ) -> AsyncIterator[pb.AttachResponse]:
        started = self._front.require_engine()
        hello = await _read_hello(request_iterator)
        self._check_hello(hello)
        stream = self._front.attach(hello.router_id)
        reader = asyncio.create_task(self._read(request_iterator, stream, started))
        # A generator whose router does not read may never resume: it frees nothing itself.
        context.add_done_callback(lambda _: reader.cancel())
        context.add_done_callback(lambda _: self._front.detach(stream))
        yield pb.AttachResponse(welcome=self._welcome(stream, started))
        async for event in stream.events():
            yield to_response(event)

    async def GetWorkerStatus(
        self, request: pb.GetWorkerStatusRequest, context: Context
    ) -> pb.GetWorkerStatusResponse:
        self._front.require_engine()
        return pb.GetWorkerStatusResponse(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            status=to_worker_status(self._front.state),
            residency=to_residency(self._front.residency),
        )

    async def _read(self, requests: Requests, stream: RouterStream, started: Started) -> None:
        """Carry out a router's commands until it stops sending or its stream ends."""
        limits = RequestLimits(
            vocab_size=self._identity.base_model.vocab_size,
            max_context_tokens=started.max_context_tokens,
        )
        error: LorryError | None = None
        try:
            async for request in requests:
                if not stream.is_open:
                    return
                self._command(stream, request, limits)
        except LorryError as refused:
            error = refused
        except Exception:
            if stream.is_open:  # else its end is what interrupted the reading
                log.exception("a command of router %r cannot be carried out", stream.router_id)
                error = LorryError("internal error")
        finally:
            self._front.detach(stream, error)

    def _command(
        self, stream: RouterStream, request: pb.AttachRequest, limits: RequestLimits
    ) -> None:
        match request.WhichOneof("command"):
            case "submit":
                build = functools.partial(_build_submit, request.submit, limits)
                self._front.submit(stream, request.submit.seq, build)
            case "cancel":
                self._front.cancel(stream, request.cancel.seqs)
            case "prefetch":
                versions = (v for v in request.prefetch.versions if len(v) == SHA256_BYTES)
                self._front.prefetch(stream, versions)
            case command:
                raise InvalidRequest.of("command", f"must not be {command or 'empty'} here")

    def _check_hello(self, hello: pb.Hello) -> None:
        if not 0 < len(hello.router_id) <= MAX_ROUTER_ID_CHARS:
            raise InvalidRequest.of(
                "hello.router_id", f"must have 1 to {MAX_ROUTER_ID_CHARS} characters"
            )
        if hello.protocol_revision != PROTOCOL_REVISION:
            raise ModelMismatch(
                f"protocol_revision {hello.protocol_revision} is not {PROTOCOL_REVISION}",
                protocolRevision=PROTOCOL_REVISION,
            )
        digest = self._identity.base_model.digest
        if hello.model_digest not in (b"", digest):
            raise ModelMismatch(
                f"model_digest {hello.model_digest.hex()} is not {digest.hex()}",
                modelDigest=digest.hex(),
            )

    def _welcome(self, stream: RouterStream, started: Started) -> pb.Welcome:
        return pb.Welcome(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            protocol_revision=PROTOCOL_REVISION,
            model_digest=self._identity.base_model.digest,
            max_context_tokens=started.max_context_tokens,
            max_rank=started.max_rank,
            submit_limit=stream.submit_limit,
            status=to_worker_status(self._front.state),
            max_running=started.max_running,
            step_tokens=started.step_tokens,
        )


class WorkerAdminServicer(WorkerAdminServiceServicer):
    def __init__(self, front: Front) -> None:
        self._front = front

    async def PinAdapter(
        self, request: admin_pb.PinAdapterRequest, context: Context
    ) -> admin_pb.PinAdapterResponse:
        self._front.require_engine()
        await self._front.pin(check_sha256(request.version, field="version"))
        return admin_pb.PinAdapterResponse(status=self._status())

    async def UnpinAdapter(
        self, request: admin_pb.UnpinAdapterRequest, context: Context
    ) -> admin_pb.UnpinAdapterResponse:
        self._front.require_engine()
        await self._front.unpin(check_sha256(request.version, field="version"))
        return admin_pb.UnpinAdapterResponse(status=self._status())

    async def EvictAdapter(
        self, request: admin_pb.EvictAdapterRequest, context: Context
    ) -> admin_pb.EvictAdapterResponse:
        self._front.require_engine()
        await self._front.evict(check_sha256(request.version, field="version"))
        return admin_pb.EvictAdapterResponse(status=self._status())

    async def Drain(
        self, request: admin_pb.DrainRequest, context: Context
    ) -> admin_pb.DrainResponse:
        self._front.require_engine()
        grace_s = to_seconds(request.grace) if request.HasField("grace") else None
        if grace_s is not None and not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidRequest.of("grace", f"must be 0 to {MAX_GRACE_S:.0f} s, got {grace_s}")
        return admin_pb.DrainResponse(aborted=await self._front.drain(grace_s))

    def _status(self) -> pb.WorkerStatus:
        return to_worker_status(self._front.state)


def _build_submit(message: pb.Submit, limits: RequestLimits, number: int) -> Any:
    return to_submit(message, number, limits)


async def _read_hello(requests: Requests) -> pb.Hello:
    """The first message of a stream."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            async for request in requests:
                if request.WhichOneof("command") == "hello":
                    return request.hello
                break
    except TimeoutError:
        raise InvalidRequest.of("command", f"no hello within {HELLO_TIMEOUT_S:.0f} s") from None
    raise InvalidRequest.of("command", "the first one must be hello")
