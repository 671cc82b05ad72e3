"""Who calls: bearer tokens, roles, and which role may call which method.

The token file is JSON, ``{"tokens": [{"sha256": hex, "tenant": id, "role": role}, ...]}``: digests
only. Without one, callers from this machine are tenant `default` with every role.
"""

import contextvars
import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorry.rpc.errors import InvalidRequest, PermissionDenied, Unauthenticated
from lorry.rpc.names import check_id

DEFAULT_TENANT = "default"


class Role(enum.Enum):
    INFER = "infer"  # generate
    MANAGE = "manage"  # change the adapters of its tenant
    WORKER = "worker"  # fetch versions
    ROUTER = "router"  # watch the catalogue, attach to workers
    ADMIN = "admin"  # everything, for all tenants


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str
    roles: frozenset[Role]

    def has(self, role: Role) -> bool:
        return role in self.roles or Role.ADMIN in self.roles

    @property
    def sees_all_tenants(self) -> bool:
        return not self.roles.isdisjoint({Role.ADMIN, Role.ROUTER})


LOCAL_CALLER = Caller(DEFAULT_TENANT, frozenset(Role))

# Roles of which a caller needs one; admin may call everything. An exact match: no rule, no access.
METHOD_ROLES: Mapping[str, frozenset[Role]] = {
    f"/lorry.v1.{service}/{method}": frozenset(roles)
    for service, methods, roles in [
        ("InferenceService", ["Generate", "StreamGenerate"], [Role.INFER]),
        ("AdapterService", ["GetAdapter", "ListAdapters"], [Role.MANAGE, Role.ROUTER]),
        (
            "AdapterService",
            [
                "UpdateAdapter",
                "DeleteAdapter",
                "ListAdapterVersions",
                "CreateUpload",
                "GetUpload",
                "UploadAdapter",
            ],
            [Role.MANAGE],
        ),
        ("CatalogueService", ["WatchCatalogue"], [Role.ROUTER]),
        ("AdapterDataService", ["FetchAdapter"], [Role.WORKER]),
        ("StoreAdminService", ["PinImage", "UnpinImage", "ListPins"], [Role.ADMIN]),
        ("WorkerService", ["Attach", "GetWorkerStatus"], [Role.ROUTER]),
        (
            "WorkerAdminService",
            ["PinAdapter", "UnpinAdapter", "EvictAdapter", "Drain"],
            [Role.ADMIN],
        ),
    ]
    for method in methods
} | {
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo": frozenset(Role)
    for version in ("v1", "v1alpha")
}

_current: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller")


def current_caller() -> Caller:
    """The caller of the RPC that this task serves."""
    return _current.get()


class CallContext(Protocol):
    """What a call tells of its caller; gRPC's servicer contexts do."""

    def peer(self) -> str: ...

    def invocation_metadata(self) -> Any: ...


class Authenticator:
    """Turns a call's metadata and peer into a `Caller` that may use the method, or refuses."""

    def __init__(self, tokens: Mapping[bytes, Caller] | None = None, *, insecure: bool = False):
        self._tokens = tokens
        self._insecure = insecure

    @classmethod
    def from_file(cls, path: Path | None, *, insecure: bool = False) -> "Authenticator":
        """Read the token file; raises ValueError naming the entry that is malformed."""
        return cls(None if path is None else read_tokens(path), insecure=insecure)

    def admit(self, method: str, context: CallContext) -> Caller:
        """Return the caller and make it the task's current one."""
        caller = self._identify(context)
        allowed = METHOD_ROLES.get(method, frozenset())
        if not any(caller.has(role) for role in allowed):
            raise PermissionDenied(f"the caller's role may not call {method}", method=method)
        _current.set(caller)
        return caller

    def _identify(self, context: CallContext) -> Caller:
        if self._tokens is None:
            if self._insecure or is_loopback_peer(context.peer()):
                return LOCAL_CALLER
            raise Unauthenticated("without a token file only callers of this machine are served")
        header = dict(context.invocation_metadata() or ()).get("authorization", "")
        scheme, _, token = str(header).partition(" ")
        caller = self._tokens.get(hashlib.sha256(token.encode()).digest())
        if scheme.lower() != "bearer" or caller is None:
            raise Unauthenticated("authorization: a valid bearer token is required")
        return caller


def read_tokens(path: Path) -> dict[bytes, Caller]:
    """Callers by the sha256 of their token."""
    try:
        entries = json.loads(path.read_text())["tokens"]
        return {_digest(e["sha256"]): _caller(e) for e in entries}
    except (OSError, ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise ValueError(f"token file {path}: {error!r}") from error


def _digest(text: str) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError(f"sha256 must be 64 hex digits, got {len(text)}")
    return digest


def _caller(entry: Mapping[str, str]) -> Caller:
    return Caller(check_id(entry["tenant"], field="tenant"), frozenset({Role(entry["role"])}))


def is_loopback_peer(peer: str) -> bool:
    """Whether gRPC's name of a peer is an address of this machine's loopback or a Unix socket."""
    return peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:"))
