"""A port from which Prometheus scrapes: HTTP, or HTTPS, on the service's own event loop.

An answer takes well under a millisecond there; a thread would hold the interpreter's lock for
longer, and the services' state belongs to the loop.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from lorry.rpc.tls import ServerTls

REQUEST_BYTES = 8192
REQUEST_S = 10.0  # from the connection to the last byte of the answer
MAX_CONNECTIONS = 8

log = logging.getLogger(__name__)


class MetricsPort:
    """Answers ``GET /metrics``, one request for each connection; drops those beyond its limit."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            async with asyncio.timeout(REQUEST_S):
                if self.num_connections <= MAX_CONNECTIONS:
                    writer.write(await self._answer(reader))
                    await writer.drain()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as error:
            log.debug("a scrape ended early: %r", error)
        finally:
            self.num_connections -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, _, target = lines[0].partition(" ")
        if method != "GET":
            return _response(HTTPStatus.METHOD_NOT_ALLOWED)
        if target.split(" ")[0].partition("?")[0] != "/metrics":
            return _response(HTTPStatus.NOT_FOUND)
        try:
            encode, content_type = choose_encoder(_header(lines, "accept"))
            return _response(HTTPStatus.OK, content_type, encode(self._registry))
        except Exception:
            log.exception("the metrics cannot be read")
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR)


@contextlib.asynccontextmanager
async def serving_metrics(
    address: str, registry: CollectorRegistry, tls: ServerTls | None = None
) -> AsyncIterator[int | None]:
    """Serve at HOST:PORT and log where; yields the port, None for the empty address: no metrics.

    With `tls` whoever scrapes must show the certificate that callers must show. Raises ValueError
    for an address that cannot be bound.
    """
    if not address:
        yield None
        return
    host, _, port = address.rpartition(":")
    serve = MetricsPort(registry).serve
    try:
        server = await asyncio.start_server(
            serve,
            host.strip("[]"),
            int(port),
            limit=REQUEST_BYTES,
            reuse_port=False,
            ssl=tls.ssl_context() if tls else None,
            ssl_handshake_timeout=REQUEST_S if tls else None,
        )
    except (OSError, OverflowError) as error:
        raise ValueError(f"metrics_address {address!r} cannot be bound; is it in use?") from error
    bound: int = server.sockets[0].getsockname()[1]
    log.info("metrics at http%s://%s:%d/metrics", "s" if tls else "", host, bound)
    try:
        yield bound
    finally:
        server.close()


def _header(lines: list[str], name: str) -> str:
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return ""


def _response(status: HTTPStatus, content_type: str = "text/plain", body: bytes = b"") -> bytes:
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
