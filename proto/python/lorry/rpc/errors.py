"""Failures that may cross a service boundary, and the one table of their codes and reasons.

Each class is a status code and an ErrorInfo reason, and the first paragraph of its docstring is
their meaning in docs/faults.md (`make docs`). What a client can act on beside them is in
`metadata`, `violations` and `retry_after_s`. `lorry.rpc.status` is how they travel.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import grpc

# A status travels in trailers, which gRPC may refuse beyond 8 KiB: its details in base64, and its
# message a second time, with up to three bytes for one.
MAX_MESSAGE_BYTES = 1024
MAX_VALUE_BYTES = 256  # of metadata, and of the parts of a violation
Code = grpc.StatusCode


class Violation(NamedTuple):
    """A field of a request and what is wrong with it."""

    field: str
    description: str


class LorryError(Exception):
    """The service failed in a way that no other reason names; its log has the cause.

    Base of every error that a client can cause or observe. `metadata` holds the dynamic values of
    the message, with lowerCamel keys and units in the key.
    """

    code: grpc.StatusCode = Code.INTERNAL
    reason: str = "ENGINE_FAILURE"

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        **metadata: str | float,
    ) -> None:
        super().__init__(clipped(message, MAX_MESSAGE_BYTES))
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.metadata = {
            key: clipped(str(value), MAX_VALUE_BYTES) for key, value in metadata.items()
        }


class InvalidRequest(LorryError):
    """A field of the request is malformed or out of range."""

    code, reason = Code.INVALID_ARGUMENT, "INVALID_REQUEST"

    @classmethod
    def of(cls, field: str, description: str) -> Self:
        """One field, named in the message and as a violation."""
        return cls(f"{field}: {description}", violations=[Violation(field, description)])


class InvalidSampling(InvalidRequest):
    """A sampling parameter is out of range."""

    reason = "INVALID_SAMPLING"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and `max_tokens` together exceed the model's context."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class AdapterInvalid(InvalidRequest):
    """An uploaded adapter cannot be served on the base model."""

    reason = "ADAPTER_INCOMPATIBLE"


class AdapterIncompatible(LorryError):
    """A registered adapter cannot be served by this worker."""

    code, reason = Code.FAILED_PRECONDITION, "ADAPTER_INCOMPATIBLE"


class AdapterNotFound(LorryError):
    """The tenant has no adapter of this name."""

    code, reason = Code.NOT_FOUND, "ADAPTER_NOT_FOUND"


class VersionNotFound(LorryError):
    """The store does not have this version of an adapter."""

    code, reason = Code.NOT_FOUND, "VERSION_NOT_FOUND"


class UploadNotFound(LorryError):
    """The tenant has no such upload, or it has expired."""

    code, reason = Code.NOT_FOUND, "UPLOAD_NOT_FOUND"


class ModelNotFound(LorryError):
    """`model` names another model than the one that is served."""

    code, reason = Code.NOT_FOUND, "MODEL_NOT_FOUND"


class AdapterExists(LorryError):
    """An adapter has this name, and `expected_etag` does not say that it is to be replaced."""

    code, reason = Code.ALREADY_EXISTS, "ADAPTER_EXISTS"


class DuplicateRequest(LorryError):
    """`request_id` is that of an active request of the tenant."""

    code, reason = Code.ALREADY_EXISTS, "DUPLICATE_REQUEST"


class AdapterInUse(LorryError):
    """The version is pinned or running, so the worker cannot give it up."""

    code, reason = Code.FAILED_PRECONDITION, "ADAPTER_IN_USE"


class LayoutUnsupported(LorryError):
    """The worker asks for a page layout that the store does not know or computes differently."""

    code, reason = Code.FAILED_PRECONDITION, "LAYOUT_UNSUPPORTED"


class ModelMismatch(LorryError):
    """The peer serves another base model or speaks another protocol revision."""

    code, reason = Code.FAILED_PRECONDITION, "MODEL_MISMATCH"


class OffsetMismatch(LorryError):
    """An upload does not continue where the store's bytes end, at metadata `receivedBytes`."""

    code, reason = Code.OUT_OF_RANGE, "OFFSET_MISMATCH"

    @classmethod
    def at(cls, received_bytes: int, offset: int) -> Self:
        return cls(f"offset must be {received_bytes}, got {offset}", receivedBytes=received_bytes)


class RevisionCompacted(LorryError):
    """Changes since the watcher's revision are not kept: it must list again."""

    code, reason = Code.OUT_OF_RANGE, "REVISION_COMPACTED"


class EtagMismatch(LorryError):
    """The adapter's etag is not the one that the request names, but metadata `etag`."""

    code, reason = Code.ABORTED, "ETAG_MISMATCH"


class WorkerLost(LorryError):
    """The worker died in mid-stream; metadata `sentTokens` tells how far it came."""

    code, reason = Code.ABORTED, "WORKER_LOST"


class Interrupted(LorryError):
    """The service shut down in mid-stream; metadata `sentTokens` tells how far it came."""

    code, reason = Code.ABORTED, "INTERRUPTED"


class Superseded(LorryError):
    """A newer stream or session of the same peer took this one's place."""

    code, reason = Code.ABORTED, "SUPERSEDED"


class DigestMismatch(LorryError):
    """Bytes that were sent or stored are damaged: their digest or checksum differs."""

    code, reason = Code.DATA_LOSS, "DIGEST_MISMATCH"

    @classmethod
    def of_version(cls, digest: bytes) -> Self:
        return cls(
            f"the stored weights of version {digest.hex()} are damaged; upload them again",
            version=digest.hex(),
        )


class QueueFull(LorryError):
    """Too much waits or is under way to take one more."""

    code, reason = Code.RESOURCE_EXHAUSTED, "QUEUE_FULL"


class TenantLimit(LorryError):
    """The tenant has reached a limit of its own: of what waits, of a rate or of its adapters."""

    code, reason = Code.RESOURCE_EXHAUSTED, "TENANT_LIMIT"


class SloUnattainable(LorryError):
    """The first token would come too late (metadata `predictedTtftS` and `askedTtftS`), or the
    others too slowly (`predictedTpotS` and `askedTpotS`)."""

    code, reason = Code.RESOURCE_EXHAUSTED, "SLO_UNATTAINABLE"


class StoreFull(LorryError):
    """The store's disk, Redis or memory has no room, or it has as many pins as it may."""

    code, reason = Code.RESOURCE_EXHAUSTED, "STORE_FULL"


class PoolTooSmall(LorryError):
    """The worker's pool can never hold the request beside its pins, or has no room for a pin beside
    what is in use."""

    code, reason = Code.RESOURCE_EXHAUSTED, "POOL_TOO_SMALL"


class SlowReader(LorryError):
    """The peer left too much unread, or read nothing for too long."""

    code, reason = Code.RESOURCE_EXHAUSTED, "SLOW_READER"


class DeadlineExpired(LorryError):
    """A deadline passed, or what the service waited for did not come in time."""

    code, reason = Code.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"


class NoWorker(LorryError):
    """No worker is ready to serve the request."""

    code, reason = Code.UNAVAILABLE, "NO_WORKER"


class Draining(LorryError):
    """The service is shutting down and takes nothing more."""

    code, reason = Code.UNAVAILABLE, "DRAINING"


class StoreUnavailable(LorryError):
    """The adapter store, its Redis or the hub cannot be used for the time being."""

    code, reason = Code.UNAVAILABLE, "STORE_UNAVAILABLE"


class Unauthenticated(LorryError):
    """The caller shows no token or certificate that is known."""

    code, reason = Code.UNAUTHENTICATED, "UNAUTHENTICATED"


class PermissionDenied(LorryError):
    """The caller's role may not call the method, or the store may not import this from the hub."""

    code, reason = Code.PERMISSION_DENIED, "PERMISSION_DENIED"


class FeatureUnsupported(LorryError):
    """The protocol has what is asked for, but the service cannot do it."""

    code, reason = Code.UNIMPLEMENTED, "FEATURE_UNSUPPORTED"


class RemoteError(LorryError):
    """A status that is in no row of this table, such as one of gRPC's own."""

    def __init__(self, message: str, *, status_code: grpc.StatusCode, status_reason: str) -> None:
        super().__init__(message)
        self.code, self.reason = status_code, status_reason


def _descendants(cls: type[LorryError]) -> Iterator[type[LorryError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _descendants(child)


ERRORS = {(e.code, e.reason): e for e in _descendants(LorryError) if e is not RemoteError}


def clipped(text: str, max_bytes: int) -> str:
    return text.encode(errors="replace")[:max_bytes].decode(errors="ignore")
