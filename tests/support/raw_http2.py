"""HTTP/2 without manners, for what gRPC's own clients would never send."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import Event, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.exceptions import ProtocolError

SEND_S = 60.0
Headers = list[tuple[str, str]]


def request_headers(path: str, *more: tuple[str, str]) -> Headers:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]


class RawHttp2:
    """One connection; what the server says is read all the time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.state = H2Connection(H2Configuration(header_encoding="latin-1"))
        self.statuses: dict[int, str] = {}  # grpc-status by stream
        self.ended: set[int] = set()
        self.closed = False
        self._news = asyncio.Event()

    async def begin(self) -> None:
        self.state.initiate_connection()
        await self.flush()

    def open(self, headers: Headers, *, end: bool = False) -> int:
        stream: int = self.state.get_next_available_stream_id()
        self.state.send_headers(stream, headers, end_stream=end)
        return stream

    async def send(self, data: bytes) -> None:
        """Bytes as they are."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(SEND_S):
                self._writer.write(data)
                await self._writer.drain()

    async def flush(self) -> None:
        await self.send(self.state.data_to_send())

    async def until_ended(self, streams: set[int], *, timeout_s: float = 60.0) -> None:
        """Until all of them have ended, or the connection has."""
        async with asyncio.timeout(timeout_s):
            while not (self.closed or streams <= self.ended):
                self._news.clear()
                await self._news.wait()

    async def read(self) -> None:
        try:
            while data := await self._reader.read(1 << 16):
                for event in self.state.receive_data(data):
                    self._hear(event)
                await self.flush()
                self._news.set()
        except (ConnectionError, ProtocolError):
            pass  # it is over, or of no more use
        finally:
            self.closed = True
            self._news.set()

    def _hear(self, event: Event) -> None:
        if isinstance(event, ResponseReceived | TrailersReceived):
            found: Any = dict(event.headers)
            if "grpc-status" in found:
                self.statuses[event.stream_id] = found["grpc-status"]
        elif isinstance(event, StreamEnded | StreamReset):
            self.ended.add(event.stream_id)


@contextlib.asynccontextmanager
async def raw_http2(address: str) -> AsyncIterator[RawHttp2]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    connection = RawHttp2(reader, writer)
    await connection.begin()
    reading = asyncio.create_task(connection.read())
    try:
        yield connection
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        writer.close()
