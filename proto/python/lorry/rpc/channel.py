"""Channels to other services, with keepalive and the caller's token."""

from pathlib import Path

import grpc
import grpc.aio

MIB = 1 << 20
Metadata = tuple[tuple[str, str], ...]


def open_channel(address: str, *, max_receive_bytes: int = 4 * MIB) -> grpc.aio.Channel:
    """A channel that notices a dead peer within 20 s; it is its opener's to close."""
    return grpc.aio.insecure_channel(address, options=_options(max_receive_bytes))


def open_blocking_channel(address: str, *, max_receive_bytes: int = 4 * MIB) -> grpc.Channel:
    """The same with gRPC's blocking API."""
    return grpc.insecure_channel(address, options=_options(max_receive_bytes))


def _options(max_receive_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", 0),
    ]


def bearer(token: str | None) -> Metadata:
    """Metadata that carries `token`; none if there is no token."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def read_token(path: Path | None) -> str | None:
    """The token in a file, without surrounding space."""
    return None if path is None else path.read_text().strip()
