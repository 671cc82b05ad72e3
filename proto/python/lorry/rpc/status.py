"""How errors travel: as google.rpc.Status in the trailers of a call, or inside a message.

`to_status` and `from_status` are inverses, so that a caller catches the class that the callee
raised. Any other exception is a defect: it is logged where it happened and reaches the peer as
INTERNAL, without its text.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from lorry.rpc.durations import to_duration, to_seconds
from lorry.rpc.errors import (
    ERRORS,
    MAX_VALUE_BYTES,
    LorryError,
    RemoteError,
    Violation,
    clipped,
)

DOMAIN = "lorry.dev"
DETAILS_KEY = "grpc-status-details-bin"  # of the trailing metadata, as gRPC names it
MAX_VIOLATIONS_BYTES = 2048
CODES = {code.value[0]: code for code in grpc.StatusCode}
M = TypeVar("M", bound=Message)


def to_status(error: Exception) -> status_pb2.Status:
    """The status that a peer receives; of a defect, only that there was one."""
    if not isinstance(error, LorryError):
        error = LorryError("internal error")
    code: int = error.code.value[0]
    status = status_pb2.Status(code=code, message=str(error))
    for detail in _details(error):
        status.details.append(_packed(detail))
    return status


def from_status(status: status_pb2.Status) -> LorryError:
    """The error that `to_status` described."""
    code = CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    info = _unpacked(status, error_details_pb2.ErrorInfo())
    cls = ERRORS.get((code, info.reason))
    if cls is None:
        return RemoteError(status.message, status_code=code, status_reason=info.reason)
    fields = _unpacked(status, error_details_pb2.BadRequest()).field_violations
    retry = _unpacked(status, error_details_pb2.RetryInfo())
    error = cls(
        status.message,
        violations=[Violation(v.field, v.description) for v in fields],
        retry_after_s=to_seconds(retry.retry_delay) if retry.HasField("retry_delay") else None,
    )
    error.metadata.update(info.metadata)  # a peer's keys may be any, such as names of arguments
    return error


def from_rpc(error: grpc.RpcError) -> LorryError:
    """The error behind a failed call, whether the peer or gRPC itself ended it."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code: int = error.code().value[0]
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            status = _parsed(value)
            # Where gRPC ended the call at the same time, its words may stand beside the peer's
            # details; only together with another code are these not what the caller got.
            if status is not None and status.code == code:
                return from_status(status)
    return RemoteError(error.details() or "", status_code=error.code(), status_reason="")


def _parsed(value: bytes | str) -> status_pb2.Status | None:
    try:
        return status_pb2.Status.FromString(cast(bytes, value))
    except DecodeError:
        return None


def _details(error: LorryError) -> Iterator[Message]:
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    if error.violations:
        yield _bad_request(error.violations)
    if error.retry_after_s is not None:
        yield error_details_pb2.RetryInfo(retry_delay=to_duration(error.retry_after_s))


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    """The first violations, as many as fit."""
    detail = error_details_pb2.BadRequest()
    for violation in violations:
        detail.field_violations.add(
            field=clipped(violation.field, MAX_VALUE_BYTES),
            description=clipped(violation.description, MAX_VALUE_BYTES),
        )
        if detail.ByteSize() > MAX_VIOLATIONS_BYTES:
            del detail.field_violations[-1]
            break
    return detail


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _unpacked(status: status_pb2.Status, detail: M) -> M:
    for packed in status.details:
        if packed.Unpack(detail):
            break
    return detail
