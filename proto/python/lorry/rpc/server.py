"""Lifetime of a gRPC server with health and reflection: up while the block runs, then drained."""

import asyncio
import contextlib
import ipaddress
import logging
import resource
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import _async as reflection
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lorry.rpc.boundary import Boundary
from lorry.rpc.call_counts import CallCounts
from lorry.rpc.channel import MIB
from lorry.rpc.health_service import NOT_SERVING, SERVING, HealthService
from lorry.rpc.identity import Authenticator
from lorry.rpc.tls import ServerTls

# Calls that a burst may leave waiting for the event loop. From 1000 on gRPC would cancel some by
# chance, without a reason; how many a service takes is its own to decide.
MAX_PENDING_CALLS = 1 << 14
MAX_PROBE_BYTES = 4096
HANDSHAKE_MS = 10_000  # of TLS and of HTTP/2
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port in use is an error, not shared
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    (
        "grpc.max_allowed_incoming_connections",
        resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4,
    ),
)

log = logging.getLogger(__name__)


class ConnectionAge(NamedTuple):
    """When a connection takes no more calls, and how much later those that it has are ended.

    Nothing else ends a call whose client neither reads nor leaves: its status waits behind what it
    has not read. Clients of gRPC connect again by themselves, before their next call.
    """

    renew_s: float
    grace_s: float

    @property
    def options(self) -> Sequence[tuple[str, int]]:
        return (
            ("grpc.max_connection_age_ms", round(self.renew_s * 1000)),
            ("grpc.max_connection_age_grace_ms", round(self.grace_s * 1000)),
        )


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    host: str
    port: int
    _services: Sequence[str]
    _health: HealthService

    def announce(self, name: str) -> None:
        """Print the one line on stdout from which a parent process learns the address."""
        print(f"lorry.{name} listening on {self.host}:{self.port}", flush=True)

    async def set_ready(self, ready: bool) -> None:
        """Tell health checks of every service and of `readiness` whether to send requests here."""
        status = SERVING if ready else NOT_SERVING
        self._health.set(("readiness", *self._services), status)

    def set_health(self, part: str, well: bool) -> None:
        """Tell health checks of a part of the service that it can do without for a while."""
        self._health.set((part,), SERVING if well else NOT_SERVING)

    async def start_draining(self) -> None:
        """Answer NOT_SERVING to every health check from now on."""
        self._health.drain()


@contextlib.asynccontextmanager
async def serving(
    register: Callable[[grpc.aio.Server], None],
    *,
    services: Sequence[str],
    address: str,
    authenticator: Authenticator,
    insecure: bool = False,
    tls: ServerTls | None = None,
    health_address: str = "",
    grace_s: float = 5.0,
    max_receive_bytes: int = 4 * MIB,
    calls: CallCounts | None = None,
    connection_age: ConnectionAge | None = None,
) -> AsyncIterator[Server]:
    """Serve what `register` adds; on exit drain for `grace_s` seconds.

    `services` are the full names of the registered services. They start NOT_SERVING: the owner
    calls `Server.set_ready`, and reads the `calls` that are counted. `health_address` is a second
    port for health checks alone, in plain text. Without a `connection_age` connections last as long
    as clients like. Raises ValueError for an address beyond loopback unless there is `tls`, or
    `insecure`.
    """
    check_address(address, guarded=insecure or tls is not None)
    boundary = Boundary(authenticator, calls or CallCounts())
    server = grpc.aio.server(
        interceptors=[boundary],
        options=[
            *OPTIONS,
            *(connection_age.options if connection_age else ()),
            ("grpc.max_receive_message_length", max_receive_bytes),
        ],
    )
    register(server)
    health_servicer = HealthService()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    _add_reflection([*services, health.SERVICE_NAME], server)
    host = address.rpartition(":")[0]
    running = Server(host, _bind(server, address, tls), services, health_servicer)
    health_servicer.set(("", "liveness"), SERVING)
    await running.set_ready(False)
    async with _probed(health_address, health_servicer, boundary):
        await server.start()
        try:
            yield running
        finally:
            await running.start_draining()
            health_servicer.end()
            await server.stop(grace_s)


async def stop_requested() -> None:
    """Return once the process receives SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


@contextlib.asynccontextmanager
async def _probed(
    address: str, health_servicer: HealthService, boundary: Boundary
) -> AsyncIterator[None]:
    """Answer health checks at a port of their own, if there is an address."""
    if not address:
        yield
        return
    server = grpc.aio.server(
        interceptors=[boundary],
        options=[*OPTIONS, ("grpc.max_receive_message_length", MAX_PROBE_BYTES)],
    )
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    port = _bind(server, address, None)
    await server.start()
    log.info("health checks in plain text at %s:%d", address.rpartition(":")[0], port)
    try:
        yield
    finally:
        await server.stop(None)


def check_address(address: str, *, guarded: bool, field: str = "address") -> None:
    """Raise ValueError unless `address` is host:port, and on loopback if it is not `guarded`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{field} must be HOST:PORT, got {address!r}")
    if not guarded and not is_loopback_address(address):
        raise ValueError(
            f"{field} {address!r} is reachable from other machines; "
            "use 127.0.0.1, or --tls, or --insecure to serve plain text there"
        )


def is_loopback_address(address: str) -> bool:
    """Whether HOST:PORT can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _bind(server: grpc.aio.Server, address: str, tls: ServerTls | None) -> int:
    try:
        if tls is not None:
            return server.add_secure_port(address, tls.credentials())
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ValueError(f"address {address!r} cannot be bound; is it in use?") from error


def _add_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Serve reflection v1alpha and v1, whose messages are the same."""
    servicer = reflection.ReflectionServicer([*services, REFLECTION_V1])
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handlers,))
