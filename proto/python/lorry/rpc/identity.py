"""Who calls: bearer tokens, certificates, roles, and which role may call which method.

A call that shows a token is its token's caller, and another one its certificate's. Where no file
says who may call, callers from this machine are tenant `default` with every role.
"""

import contextvars
import enum
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lorry.rpc.errors import PermissionDenied, Unauthenticated

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
        (
            "StoreAdminService",
            ["PinImage", "UnpinImage", "ListPins", "ListImports", "ImportFromHub"],
            [Role.ADMIN],
        ),
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

    def auth_context(self) -> Mapping[str, Any]: ...


class Authenticator:
    """Turns a call's metadata and peer into a `Caller` that may use the method, or refuses."""

    def __init__(
        self,
        tokens: Callable[[], Mapping[bytes, Caller]] | None = None,
        certificates: Callable[[], Mapping[str, Caller]] | None = None,
        *,
        insecure: bool = False,
    ) -> None:
        """The callers by the sha256 of their token and by a name in their certificate, as they are
        now; a connection with a certificate has been checked by TLS."""
        self._tokens = tokens
        self._certificates = certificates
        self._insecure = insecure

    def admit(self, method: str, context: CallContext) -> Caller:
        """Return the caller and make it the task's current one."""
        caller = self._identify(context)
        allowed = METHOD_ROLES.get(method, frozenset())
        if not any(caller.has(role) for role in allowed):
            raise PermissionDenied(f"the caller's role may not call {method}", method=method)
        _current.set(caller)
        return caller

    def _identify(self, context: CallContext) -> Caller:
        if self._tokens is None and self._certificates is None:
            if self._insecure or is_loopback_peer(context.peer()):
                return LOCAL_CALLER
            raise Unauthenticated("nothing says who may call but callers of this machine")
        header = dict(context.invocation_metadata() or ()).get("authorization")
        if self._tokens is not None and (header is not None or self._certificates is None):
            return _by_token(self._tokens(), str(header))
        assert self._certificates is not None
        return _by_certificate(self._certificates(), context)


def _by_token(tokens: Mapping[bytes, Caller], header: str) -> Caller:
    scheme, _, token = header.partition(" ")
    caller = tokens.get(hashlib.sha256(token.encode()).digest())
    if scheme.lower() != "bearer" or caller is None:
        raise Unauthenticated("authorization: a valid bearer token is required")
    return caller


def _by_certificate(certificates: Mapping[str, Caller], context: CallContext) -> Caller:
    names = list(_names(context.auth_context()))
    for name in names:
        if caller := certificates.get(name):
            return caller
    raise Unauthenticated(
        f"no certificate of a known caller: {names or 'none'}; nor was a token shown"
    )


def _names(peer: Mapping[str, Any]) -> Iterator[str]:
    """The subject alternative names of the caller's certificate, with their kinds."""
    for key, kind in (("peer_uri", "URI:"), ("peer_dns", "DNS:")):
        for name in peer.get(key, ()):
            yield kind + name.decode(errors="replace")


def is_loopback_peer(peer: str) -> bool:
    """Whether gRPC's name of a peer is an address of this machine's loopback or a Unix socket."""
    return peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:"))
