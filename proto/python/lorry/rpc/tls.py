"""TLS by a directory of PEM files, named as in Kubernetes' secrets of type kubernetes.io/tls.

``tls.crt`` and ``tls.key`` are this side's certificate chain and key, ``ca.crt`` the authorities by
which the other side's certificate must be signed. Servers need all that they use; clients need
ca.crt, and the other two where a server asks for a certificate. The files may be replaced at any
time: new connections use what is there, if it fits together, and else what was there before.
"""

import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from lorry.rpc.reloading import LOOK_S, Reloading

CERTIFICATE, KEY, AUTHORITIES = "tls.crt", "tls.key", "ca.crt"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pems:
    """Contents of the files that fit together; None for those that are not there or not used."""

    chain: bytes | None
    key: bytes | None
    authorities: bytes | None


class ServerTls:
    """A server's side. With `mutual`, callers must show a certificate of the authorities."""

    def __init__(self, directory: Path, *, mutual: bool) -> None:
        """Raises ValueError naming a file that is missing, damaged or does not fit the others."""
        self._directory = directory
        self._mutual = mutual
        names = [CERTIFICATE, KEY, *([AUTHORITIES] if mutual else [])]
        self._pems = Reloading(
            [directory / name for name in names],
            lambda: read_pems(directory, needed=names, optional=[]),
            look_s=0.0,  # once for each connection
        )
        self._served = self._pems.get()

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC, which asks before each handshake whether there is something new."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(self._served),
            self._changed,  # type: ignore[arg-type]  # None: no change
            require_client_authentication=self._mutual,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For asyncio's servers; each connection gets the files as they are then."""
        outer = self._new_context()

        def renew(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            try:
                connection.context = self._new_context()
            except (OSError, ValueError) as error:  # they are just being replaced
                log.warning("%s: %s; the first certificate is shown", self._directory, error)

        outer.sni_callback = renew
        return outer

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._directory / CERTIFICATE, self._directory / KEY)
        if self._mutual:
            context.load_verify_locations(self._directory / AUTHORITIES)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        pems = self._pems.get()
        if pems is self._served:
            return None
        self._served = pems
        return self._configuration(pems)

    def _configuration(self, pems: Pems) -> grpc.ServerCertificateConfiguration:
        assert pems.key is not None
        assert pems.chain is not None
        return grpc.ssl_server_certificate_configuration(
            [(pems.key, pems.chain)], root_certificates=pems.authorities
        )


class ClientTls:
    """A client's side; `credentials` are new ones after a change of the files."""

    def __init__(self, directory: Path, *, look_s: float = LOOK_S) -> None:
        """Raises ValueError naming a file that is missing, damaged or does not fit the others."""
        self._credentials = Reloading(
            [directory / name for name in (CERTIFICATE, KEY, AUTHORITIES)],
            lambda: _channel_credentials(directory),
            look_s=look_s,
        )

    def credentials(self) -> grpc.ChannelCredentials:
        """The same object until the files change."""
        return self._credentials.get()


def _channel_credentials(directory: Path) -> grpc.ChannelCredentials:
    pems = read_pems(directory, needed=[AUTHORITIES], optional=[CERTIFICATE, KEY])
    return grpc.ssl_channel_credentials(pems.authorities, pems.key, pems.chain)


def read_pems(directory: Path, *, needed: list[str], optional: list[str]) -> Pems:
    """Raises ValueError naming a file that is missing, damaged or does not fit the others."""
    found = {name: _read(directory / name) for name in needed}
    found |= {name: _read(directory / name) for name in optional if (directory / name).exists()}
    if (CERTIFICATE in found) != (KEY in found):
        raise ValueError(f"{directory} must have both {CERTIFICATE} and {KEY}, or neither")
    if CERTIFICATE in found:
        _check_pair(directory, found)
    if AUTHORITIES in found:
        _certificates(directory / AUTHORITIES, found[AUTHORITIES])
    return Pems(found.get(CERTIFICATE), found.get(KEY), found.get(AUTHORITIES))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _check_pair(directory: Path, found: Mapping[str, bytes]) -> None:
    certificate = _certificates(directory / CERTIFICATE, found[CERTIFICATE])[0]
    try:
        key = load_pem_private_key(found[KEY], password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / KEY} is no private key without a password") from error
    if key.public_key() != certificate.public_key():
        raise ValueError(f"{directory / KEY} is not the key of {directory / CERTIFICATE}")
    if certificate.not_valid_after_utc < datetime.now(UTC):
        expired = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        log.error("%s has expired at %s", directory / CERTIFICATE, expired)


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(f"{path} holds no certificates") from error
