from base64 import b64encode
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from lorry.rpc.errors import (
    ERRORS,
    Code,
    DeadlineExpired,
    InvalidRequest,
    LorryError,
    NoWorker,
    QueueFull,
    RemoteError,
    Violation,
)
from lorry.rpc.status import DOMAIN, from_rpc, from_status, to_status

# What clients may rely on: a reason, and the code that it comes with.
TABLE = {
    ("INTERNAL", "ENGINE_FAILURE"),
    ("INVALID_ARGUMENT", "INVALID_REQUEST"),
    ("INVALID_ARGUMENT", "INVALID_SAMPLING"),
    ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED"),
    ("INVALID_ARGUMENT", "ADAPTER_INCOMPATIBLE"),
    ("FAILED_PRECONDITION", "ADAPTER_INCOMPATIBLE"),
    ("FAILED_PRECONDITION", "ADAPTER_IN_USE"),
    ("FAILED_PRECONDITION", "LAYOUT_UNSUPPORTED"),
    ("FAILED_PRECONDITION", "MODEL_MISMATCH"),
    ("NOT_FOUND", "ADAPTER_NOT_FOUND"),
    ("NOT_FOUND", "VERSION_NOT_FOUND"),
    ("NOT_FOUND", "UPLOAD_NOT_FOUND"),
    ("NOT_FOUND", "MODEL_NOT_FOUND"),
    ("ALREADY_EXISTS", "ADAPTER_EXISTS"),
    ("ALREADY_EXISTS", "DUPLICATE_REQUEST"),
    ("OUT_OF_RANGE", "OFFSET_MISMATCH"),
    ("OUT_OF_RANGE", "REVISION_COMPACTED"),
    ("ABORTED", "ETAG_MISMATCH"),
    ("ABORTED", "INTERRUPTED"),
    ("ABORTED", "SUPERSEDED"),
    ("ABORTED", "WORKER_LOST"),
    ("DATA_LOSS", "DIGEST_MISMATCH"),
    ("RESOURCE_EXHAUSTED", "POOL_TOO_SMALL"),
    ("RESOURCE_EXHAUSTED", "QUEUE_FULL"),
    ("RESOURCE_EXHAUSTED", "SLO_UNATTAINABLE"),
    ("RESOURCE_EXHAUSTED", "SLOW_READER"),
    ("RESOURCE_EXHAUSTED", "STORE_FULL"),
    ("RESOURCE_EXHAUSTED", "TENANT_LIMIT"),
    ("DEADLINE_EXCEEDED", "DEADLINE_EXPIRED"),
    ("UNAVAILABLE", "DRAINING"),
    ("UNAVAILABLE", "NO_WORKER"),
    ("UNAVAILABLE", "STORE_UNAVAILABLE"),
    ("UNAUTHENTICATED", "UNAUTHENTICATED"),
    ("PERMISSION_DENIED", "PERMISSION_DENIED"),
    ("UNIMPLEMENTED", "FEATURE_UNSUPPORTED"),
}
CLASSES = sorted(ERRORS.values(), key=lambda error: (error.reason, error.code.name))


def details_of(status: status_pb2.Status) -> list[str]:
    return [detail.type_url.rpartition(".")[2] for detail in status.details]


def test_the_table_of_codes_and_reasons_is_what_clients_rely_on() -> None:
    assert {(code.name, reason) for code, reason in ERRORS} == TABLE


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error: error.__name__)
def test_an_error_survives_its_status(error_class: type[LorryError]) -> None:
    error = error_class(
        "value 7 is bad",
        violations=[Violation("spec.x", "is 7"), Violation("spec.y", "is empty")],
        retry_after_s=1.25,
        queueDepth=7,
        adapter="tenants/a/adapters/b",
    )
    received = from_status(to_status(error))
    assert type(received) is error_class
    assert str(received) == "value 7 is bad"
    assert received.violations == error.violations
    assert received.retry_after_s == 1.25
    assert received.metadata == {"queueDepth": "7", "adapter": "tenants/a/adapters/b"}


def test_an_error_info_with_our_domain_is_always_there_and_the_rest_only_if_it_says_something() -> (
    None
):
    status = to_status(QueueFull("full"))
    info = error_details_pb2.ErrorInfo()
    assert details_of(status) == ["ErrorInfo"]
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, "QUEUE_FULL")
    assert from_status(status).retry_after_s is None


def test_metadata_may_have_any_keys() -> None:
    status = to_status(NoWorker("nobody there"))
    info = error_details_pb2.ErrorInfo(reason="NO_WORKER", metadata={"message": "a", "self": "b"})
    status.details[0].Pack(info)
    error = from_status(status)
    assert isinstance(error, NoWorker)
    assert error.metadata == {"message": "a", "self": "b"}


def test_a_retry_at_once_is_not_the_same_as_no_advice() -> None:
    status = to_status(QueueFull("full", retry_after_s=0))
    assert details_of(status) == ["ErrorInfo", "RetryInfo"]
    assert from_status(status).retry_after_s == 0


def test_a_defect_keeps_its_text_to_itself() -> None:
    status = to_status(KeyError("the secret"))
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in str(status)


def test_a_status_of_no_row_is_a_remote_error_with_its_code() -> None:
    error = from_status(status_pb2.Status(code=14, message="connection reset"))
    assert type(error) is RemoteError
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "")


def failed_call(code: grpc.StatusCode, details: bytes) -> grpc.aio.AioRpcError:
    """A call whose end gRPC has put into words of its own."""
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", details))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, "Stream removed")


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (Code.DEADLINE_EXCEEDED, to_status(DeadlineExpired("late")), "DEADLINE_EXPIRED"),
        (Code.UNAVAILABLE, to_status(DeadlineExpired("late")), ""),
        (Code.UNAVAILABLE, None, ""),
    ],
)
def test_what_the_peer_said_counts_if_it_is_what_the_call_ended_with(
    code: grpc.StatusCode, details: status_pb2.Status | None, expected: str
) -> None:
    raw = b"\xff" if details is None else details.SerializeToString()
    error = from_rpc(failed_call(code, raw))
    assert (error.code, error.reason) == (code, expected)
    assert str(error) == ("late" if expected else "Stream removed")


def test_an_unknown_code_is_unknown() -> None:
    assert from_status(status_pb2.Status(code=99, message="?")).code is grpc.StatusCode.UNKNOWN


def test_a_violation_names_its_field_in_the_message_too() -> None:
    error = InvalidRequest.of("spec.max_tokens", "must be positive, got 0")
    assert str(error) == "spec.max_tokens: must be positive, got 0"
    assert error.violations == (Violation("spec.max_tokens", "must be positive, got 0"),)


def test_the_largest_status_fits_into_the_trailers() -> None:
    long = "\N{SNOWMAN}" * 10_000
    status = to_status(InvalidRequest(long, violations=[Violation(long, long)] * 100, adapter=long))
    assert len(b64encode(status.SerializeToString())) + len(quote(status.message)) < 8192
    received = from_status(status)
    assert long.startswith(str(received))
    assert received.violations
    assert all(long.startswith(each.description) for each in received.violations)
