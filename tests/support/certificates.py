"""Certificates of a test's own authority."""

from datetime import timedelta
from pathlib import Path

from lorry.client.secrets.authority import Authority, certificate_text, key_text
from lorry.client.secrets.certificates import make_certificate
from lorry.client.secrets.directory import SecretsDirectory
from lorry.rpc.identity import Role
from lorry.rpc.tls import CERTIFICATE, KEY

LOCAL_HOSTS = ["localhost", "127.0.0.1"]


def certify(secrets: Path, name: str, role: Role | None = None, *, tenant: str = "acme") -> Path:
    """The directory of a new certificate for this machine."""
    directory = SecretsDirectory(secrets)
    make_certificate(
        directory,
        name,
        hosts=LOCAL_HOSTS,
        lifetime=timedelta(days=1),
        tenant=tenant,
        role=role,
        world_readable=False,
    )
    return directory.of(name)


def certify_again(
    secrets: Path, name: str, *, hosts: list[str] = LOCAL_HOSTS, lifetime: timedelta
) -> None:
    """Replace a certificate by one of another life or other hosts."""
    authority = Authority.at(secrets / "authority")
    certificate, key = authority.issue(name, hosts=hosts, lifetime=lifetime)
    (secrets / name / KEY).write_text(key_text(key))
    (secrets / name / CERTIFICATE).write_text(certificate_text(certificate))
