"""A private certificate authority: one key that signs the certificates of a deployment."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lorry.client.secrets.directory import PRIVATE, PUBLIC, write

CERTIFICATE, KEY = "ca.crt", "ca.key"
AUTHORITY_DAYS = 3650
CLOCK_SKEW = timedelta(minutes=5)  # by which another machine's clock may be behind
SPIFFE_PREFIX = "spiffe://lorry/"


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def at(cls, directory: Path) -> "Authority":
        """The one in the directory, made if there is none; raises ValueError if it is damaged."""
        paths = (directory / CERTIFICATE, directory / KEY)
        if not cls.is_in(directory):
            made = cls.make()
            write(paths[1], key_text(made.key), mode=PRIVATE)
            write(paths[0], made.text, mode=PUBLIC)
        try:
            certificate = x509.load_pem_x509_certificate(paths[0].read_bytes())
            key = load_pem_private_key(paths[1].read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise ValueError(f"the authority in {directory} cannot be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{paths[1]} is no key of an elliptic curve")
        if key.public_key() != certificate.public_key():
            raise ValueError(f"{paths[1]} is not the key of {paths[0]}")
        return cls(certificate, key)

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether there is one, or what is left of it."""
        return any((directory / name).exists() for name in (CERTIFICATE, KEY))

    @classmethod
    def make(cls) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Lorry authority")
        now = datetime.now(UTC)
        usage = _key_usage(signs_certificates=True)
        builder = (
            _builder(name, name, key.public_key())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
        )
        return cls(builder.sign(key, SHA256()), key)

    @property
    def text(self) -> str:
        """Its certificate as PEM."""
        return certificate_text(self.certificate)

    def issue(
        self, name: str, *, hosts: Sequence[str], lifetime: timedelta
    ) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """A certificate for serving at `hosts` and for calling as ``spiffe://lorry/{name}``.

        Raises ValueError for a host that is none, and if the authority would end before.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        if now + lifetime > self.certificate.not_valid_after_utc:
            raise ValueError(
                f"the authority is valid until {self.certificate.not_valid_after_utc:%Y-%m-%d}, "
                f"not for another {lifetime.days} days"
            )
        uri = x509.UniformResourceIdentifier(SPIFFE_PREFIX + name)
        names = x509.SubjectAlternativeName([uri, *map(_general_name, hosts)])
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        usage = _key_usage(signs_certificates=False)
        builder = (
            _builder(_name(name), self.certificate.subject, key.public_key())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(names, critical=False)
            .add_extension(issuer, critical=False)
        )
        return builder.sign(self.key, SHA256()), key


def certificate_text(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def key_text(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses at which its owner may serve."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        name = host.encode("idna").decode()
    except UnicodeError as error:
        raise ValueError(f"host must be a name or an address, got {host!r}") from error
    if not name or set(name) & set(" /:@"):
        raise ValueError(f"host must be a name or an address, got {host!r}")
    return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
