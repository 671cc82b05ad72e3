"""Certificates of services and clients, and the file that says which of them may call as whom."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509

from lorry.client.secrets.authority import (
    CERTIFICATE as AUTHORITY_CERTIFICATE,
)
from lorry.client.secrets.authority import (
    SPIFFE_PREFIX,
    Authority,
    certificate_text,
    hosts_of,
    key_text,
)
from lorry.client.secrets.directory import (
    PRIVATE,
    PUBLIC,
    SecretsDirectory,
    read_entries,
    write,
    write_entries,
)
from lorry.rpc.identity import Role
from lorry.rpc.names import check_id
from lorry.rpc.tls import CERTIFICATE, KEY

CALLERS_KEY = "certificates"
RENEWED_SHARE = 1 / 3  # of its life that is left when a certificate is renewed


@dataclass(frozen=True, slots=True)
class CertificateEntry:
    """One certificate of the directory."""

    name: str
    certificate: x509.Certificate

    @property
    def hosts(self) -> list[str]:
        return hosts_of(self.certificate)

    @property
    def expires(self) -> datetime:
        return self.certificate.not_valid_after_utc

    @property
    def lifetime(self) -> timedelta:
        """In whole days."""
        return timedelta(days=(self.expires - self.certificate.not_valid_before_utc).days)

    def is_due_at(self, now: datetime) -> bool:
        return self.expires - now < self.lifetime * RENEWED_SHARE


def list_certificates(directory: SecretsDirectory) -> list[CertificateEntry]:
    """Raises ValueError naming a file that is no certificate, or if nothing was ever made here.

    Copies of the directory for services have certificates and no authority.
    """
    entries = []
    for name in directory.names:
        path = directory.of(name) / CERTIFICATE
        if path.exists():
            try:
                certificate = x509.load_pem_x509_certificate(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} is no certificate: {error}") from error
            entries.append(CertificateEntry(name, certificate))
    if not entries:
        _check_authority(directory)
    return entries


def list_callers(directory: SecretsDirectory) -> dict[str, str]:
    """Tenant and role by the names of certificates that may call."""
    entries = read_entries(directory.certificates, CALLERS_KEY)
    return {entry["san"]: f"{entry['tenant']} {entry['role']}" for entry in entries}


def make_certificate(
    directory: SecretsDirectory,
    name: str,
    *,
    hosts: Sequence[str],
    lifetime: timedelta,
    tenant: str,
    role: Role | None,
    world_readable: bool,
) -> None:
    """Make or replace the certificate of `name`, and let it call as `role`, if it is given one."""
    check_id(tenant, field="tenant")
    directory.of(name)
    with directory.changing(make=True):
        _issue(directory, name, hosts, lifetime, mode=PUBLIC if world_readable else PRIVATE)
        callers = [] if role is None else [_caller(name, tenant, role)]
        _set_callers(directory, name, callers)


def renew_certificates(directory: SecretsDirectory, *, every: bool = False) -> list[str]:
    """Issue anew, for as long as before, what has little of its life left; returns their names.

    Raises ValueError if there is no authority: another one would sign what no service trusts.
    """
    _check_authority(directory)
    now = datetime.now(UTC)
    with directory.changing():
        due = [entry for entry in list_certificates(directory) if every or entry.is_due_at(now)]
        for entry in due:
            mode = (directory.of(entry.name) / KEY).stat().st_mode & 0o777
            _issue(directory, entry.name, entry.hosts, entry.lifetime, mode=mode)
    return [entry.name for entry in due]


def revoke_certificate(directory: SecretsDirectory, name: str) -> None:
    """Take the certificate's right to call, and delete it; raises ValueError if there is none."""
    with directory.changing():
        if not (directory.of(name) / CERTIFICATE).exists():
            raise ValueError(f"there is no certificate {name!r} in {directory.path}")
        _set_callers(directory, name, [])
        for file in (KEY, CERTIFICATE, AUTHORITY_CERTIFICATE):
            (directory.of(name) / file).unlink(missing_ok=True)
        if not any(directory.of(name).iterdir()):
            shutil.rmtree(directory.of(name))


def caller_name(name: str) -> str:
    """What certificates.json calls the certificate of `name`."""
    return f"URI:{SPIFFE_PREFIX}{name}"


def _check_authority(directory: SecretsDirectory) -> None:
    if not Authority.is_in(directory.authority):
        raise ValueError(f"{directory.path} holds no authority; `lorry certs make` makes one")


def _issue(
    directory: SecretsDirectory, name: str, hosts: Sequence[str], lifetime: timedelta, *, mode: int
) -> None:
    authority = Authority.at(directory.authority)
    certificate, key = authority.issue(name, hosts=hosts, lifetime=lifetime)
    part = directory.of(name)
    write(part / AUTHORITY_CERTIFICATE, authority.text, mode=PUBLIC)
    write(part / KEY, key_text(key), mode=mode)
    write(part / CERTIFICATE, certificate_text(certificate), mode=PUBLIC)


def _caller(name: str, tenant: str, role: Role) -> dict[str, Any]:
    return {"san": caller_name(name), "tenant": tenant, "role": role.value}


def _set_callers(directory: SecretsDirectory, name: str, callers: list[dict[str, Any]]) -> None:
    others = [
        entry
        for entry in read_entries(directory.certificates, CALLERS_KEY)
        if entry["san"] != caller_name(name)
    ]
    write_entries(directory.certificates, CALLERS_KEY, [*others, *callers])
