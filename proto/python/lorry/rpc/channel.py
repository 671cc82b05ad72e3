"""Channels to other services, with keepalive, the caller's token and TLS."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from lorry.rpc.reloading import Reloading
from lorry.rpc.renewed_channel import Metadata, RenewedChannel
from lorry.rpc.tls import ClientTls

MIB = 1 << 20
ROUND_ROBIN = '{"loadBalancingConfig": [{"round_robin": {}}]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What is shown to a service, and by whom its certificate must be signed.

    `tls` is a directory as `lorry.rpc.tls` describes; without it channels are in plain text. Token
    file and directory are read again when they change.
    """

    token: str | None = None
    token_file: Path | None = None
    tls: Path | None = None

    def read_metadata(self) -> Callable[[], Metadata]:
        """The token as metadata at the moment; raises ValueError for a file without one."""
        file = self.token_file
        if file is None:
            return lambda: bearer(self.token)
        return Reloading([file], lambda: bearer(read_token(file))).get


ANONYMOUS = Credentials()


class Channels:
    """Opens channels that share credentials: where their files are being replaced or damaged, new
    channels too begin with what was read last."""

    def __init__(self, credentials: Credentials) -> None:
        """Raises ValueError for credentials that cannot be read."""
        self._anonymous = credentials == ANONYMOUS
        self._metadata = credentials.read_metadata()
        self._tls = None if credentials.tls is None else ClientTls(credentials.tls)

    def open(
        self,
        address: str,
        *,
        max_receive_bytes: int = 4 * MIB,
        server_name: str | None = None,
        spread: bool = False,
    ) -> grpc.aio.Channel:
        """A channel that notices a dead peer within 20 s; it is its opener's to close.

        `server_name` is what the service's certificate must be for, if not the address's host. With
        `spread`, calls go in turns to all that the address stands for, where that is a name.
        """
        options = _options(max_receive_bytes, server_name)
        if spread:
            options.append(("grpc.service_config", ROUND_ROBIN))
        plain, secure = grpc.aio.insecure_channel, grpc.aio.secure_channel
        if self._anonymous:
            return plain(address, options=options)
        if self._tls is None:
            return RenewedChannel(
                lambda: None, lambda _: plain(address, options=options), self._metadata
            )
        return RenewedChannel(
            self._tls.credentials,
            lambda current: secure(address, current, options=options),
            self._metadata,
        )


def open_channel(
    address: str,
    credentials: Credentials = ANONYMOUS,
    *,
    max_receive_bytes: int = 4 * MIB,
    spread: bool = False,
    server_name: str | None = None,
) -> grpc.aio.Channel:
    """A single one, as `Channels` opens it; raises ValueError for credentials that cannot be
    read."""
    return Channels(credentials).open(
        address, max_receive_bytes=max_receive_bytes, server_name=server_name, spread=spread
    )


def open_blocking_channel(
    address: str, credentials: Credentials = ANONYMOUS, *, max_receive_bytes: int = 4 * MIB
) -> grpc.Channel:
    """The same with gRPC's blocking API, for a short life: it keeps the TLS that it begins with,
    and its calls must be given the token."""
    options = _options(max_receive_bytes, None)
    if credentials.tls is None:
        return grpc.insecure_channel(address, options=options)
    current = ClientTls(credentials.tls).credentials()
    return grpc.secure_channel(address, current, options=options)


def _options(max_receive_bytes: int, server_name: str | None) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # how long TCP and TLS may take, despite its name
        # Shorter than a client's retries last: the last one does not fail of a wait to connect.
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.enable_retries", 0),
    ]
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return options


def bearer(token: str | None) -> Metadata:
    """Metadata that carries `token`; none if there is no token."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def read_token(path: Path) -> str:
    """The token in a file, without surrounding space; raises ValueError for a file without one."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"token file {path} cannot be read: {error}") from error
    if not (token.isascii() and token.isprintable() and token):
        raise ValueError(f"token file {path} must hold one line of printable ASCII characters")
    return token
