"""`lorry tokens` and `lorry certs`, and what services read of what they make."""

import hashlib
import json
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from lorry.client.cli import app
from lorry.client.secrets.certificates import list_certificates, renew_certificates
from lorry.client.secrets.directory import SecretsDirectory
from lorry.rpc.callers import read_certificates, read_tokens
from lorry.rpc.identity import Caller, Role
from lorry.rpc.tls import AUTHORITIES, CERTIFICATE, KEY, read_pems

FILES = [CERTIFICATE, KEY, AUTHORITIES]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "secrets"


def lorry(*arguments: object) -> None:
    app([str(argument) for argument in arguments])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def caller(tenant: str, role: Role) -> Caller:
    return Caller(tenant, frozenset({role}))


def token_digest(directory: Path, name: str) -> bytes:
    return hashlib.sha256((directory / name / "token").read_text().strip().encode()).digest()


def certificate(directory: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / name / CERTIFICATE).read_bytes())


def test_a_token_is_what_its_digest_says_and_only_its_owner_can_read_it(directory: Path) -> None:
    lorry("tokens", "make", directory, "router", "infer")
    lorry("tokens", "make", directory, "alice", "--role", "manage", "--tenant", "acme")
    assert read_tokens(directory / "callers" / "tokens.json") == {
        token_digest(directory, "router"): caller("default", Role.ROUTER),
        token_digest(directory, "infer"): caller("default", Role.INFER),
        token_digest(directory, "alice"): caller("acme", Role.MANAGE),
    }
    assert (mode(directory), mode(directory / "alice" / "token")) == (0o700, 0o600)


def test_no_token_is_in_the_file_that_services_read(directory: Path) -> None:
    lorry("tokens", "make", directory, "infer")
    token = (directory / "infer" / "token").read_text().strip()
    assert token not in (directory / "callers" / "tokens.json").read_text()


def test_making_a_token_again_keeps_it(directory: Path) -> None:
    lorry("tokens", "make", directory, "router", "infer")
    before = contents(directory)
    lorry("tokens", "make", directory, "router", "infer")
    assert contents(directory) == before


def test_a_name_is_not_given_to_another_tenant_or_role(directory: Path) -> None:
    lorry("tokens", "make", directory, "alice", "--role", "infer")
    for options in (["--role", "admin"], ["--role", "infer", "--tenant", "acme"]):
        with pytest.raises(ValueError, match="'alice' is of tenant default and role infer"):
            lorry("tokens", "make", directory, "alice", *options)


@pytest.mark.parametrize(
    ("names", "refusal"),
    [
        ([], "at least one"),
        (["alice"], "--role must be given for 'alice'"),
        (["infer", "callers"], "--role must be given for 'callers'"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_made_leave_nothing(
    directory: Path, names: list[str], refusal: str
) -> None:
    with pytest.raises(ValueError, match=refusal):
        lorry("tokens", "make", directory, *names)
    assert not directory.exists()


@pytest.mark.parametrize("name", ["callers", "authority", "../x", "A"])
def test_what_cannot_be_a_name_is_refused(directory: Path, name: str) -> None:
    for command in ("tokens", "certs"):
        with pytest.raises(Exception, match="name"):
            lorry(command, "make", directory, name, "--role", "infer")
    assert not directory.exists()


def test_a_revoked_token_is_gone_and_the_others_stay(directory: Path) -> None:
    lorry("tokens", "make", directory, "router", "infer")
    digest = token_digest(directory, "router")
    lorry("tokens", "revoke", directory, "infer")
    assert set(read_tokens(directory / "callers" / "tokens.json")) == {digest}
    assert not (directory / "infer" / "token").exists()
    with pytest.raises(ValueError, match="no token 'infer'"):
        lorry("tokens", "revoke", directory, "infer")


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        (["certs", "renew"], "secrets holds no authority; `lorry certs make` makes one"),
        (["certs", "list"], "secrets holds no authority; `lorry certs make` makes one"),
        (["certs", "revoke", "router"], "no directory .*secrets"),
        (["tokens", "revoke", "router"], "no directory .*secrets"),
        (["tokens", "list"], "no directory .*secrets"),
    ],
)
def test_a_directory_that_is_not_there_is_named_and_not_made(
    directory: Path, command: list[str], refusal: str
) -> None:
    with pytest.raises(ValueError, match=refusal):
        lorry(*command[:2], directory, *command[2:])
    assert not directory.exists()


def test_a_copy_without_the_authority_is_listed_but_not_renewed(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lorry("certs", "make", directory, "router")
    shutil.rmtree(directory / "authority")
    capsys.readouterr()
    lorry("certs", "list", directory)
    assert capsys.readouterr().out.splitlines()[1].startswith("router ")
    with pytest.raises(ValueError, match="holds no authority"):
        lorry("certs", "renew", directory, "--every")
    assert not (directory / "authority").exists()


def test_tokens_are_listed_without_what_is_secret(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lorry("tokens", "make", directory, "alice", "--role", "manage", "--tenant", "acme")
    capsys.readouterr()
    lorry("tokens", "list", directory)
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:3] == ["alice", "acme", "manage"]
    assert row[4] == token_digest(directory, "alice").hex()[:12]


def test_a_list_of_tokens_that_is_damaged_is_named_and_kept(directory: Path) -> None:
    lorry("tokens", "make", directory, "infer")
    file = directory / "callers" / "tokens.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=r"tokens\.json"):
        lorry("tokens", "make", directory, "admin")
    assert not (directory / "admin").exists()


def test_a_certificate_serves_at_its_hosts_and_calls_as_its_name(directory: Path) -> None:
    lorry("certs", "make", directory, "router", "--host", "10.0.0.7", "--host", "r.example")
    made = certificate(directory, "router")
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["router", "r.example"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://lorry/router"]
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    authority = x509.load_pem_x509_certificate((directory / "router" / AUTHORITIES).read_bytes())
    made.verify_directly_issued_by(authority)
    read_pems(directory / "router", needed=FILES, optional=[])


def test_keys_are_their_owners_unless_containers_must_read_them(directory: Path) -> None:
    lorry("certs", "make", directory, "router")
    assert mode(directory / "router" / KEY) == 0o600
    assert mode(directory / "authority" / "ca.key") == 0o600
    lorry("certs", "make", directory, "worker", "--world-readable")
    assert mode(directory / "worker" / KEY) == 0o644
    assert mode(directory) == 0o700


def test_only_names_with_a_role_may_call(directory: Path) -> None:
    lorry("certs", "make", directory, "router", "adapter-store")
    lorry("certs", "make", directory, "alice", "--role", "manage", "--tenant", "acme")
    callers = directory / "callers" / "certificates.json"
    router, alice = "URI:spiffe://lorry/router", "URI:spiffe://lorry/alice"
    assert read_certificates(callers) == {
        router: caller("default", Role.ROUTER),
        alice: caller("acme", Role.MANAGE),
    }
    lorry("certs", "revoke", directory, "alice")
    assert read_certificates(callers) == {router: caller("default", Role.ROUTER)}
    assert not (directory / "alice").exists()


def test_certificates_are_renewed_when_little_of_their_life_is_left(directory: Path) -> None:
    lorry("certs", "make", directory, "router", "--host", "localhost", "--world-readable")
    before = contents(directory)
    lorry("certs", "renew", directory)
    assert contents(directory) == before
    assert renew_certificates(SecretsDirectory(directory), every=True) == ["router"]
    old = x509.load_pem_x509_certificate(before[directory / "router" / CERTIFICATE])
    (new,) = list_certificates(SecretsDirectory(directory))
    assert new.certificate.serial_number != old.serial_number
    assert (new.hosts, new.lifetime) == (["router", "localhost"], timedelta(days=90))
    assert mode(directory / "router" / KEY) == 0o644
    read_pems(directory / "router", needed=FILES, optional=[])


def test_a_third_of_its_life_before_its_end_a_certificate_is_due(directory: Path) -> None:
    lorry("certs", "make", directory, "router", "--days", "9")
    (entry,) = list_certificates(SecretsDirectory(directory))
    now = datetime.now(UTC)
    assert entry.is_due_at(now + timedelta(days=6, hours=1))
    assert not entry.is_due_at(now + timedelta(days=5, hours=23))


@pytest.mark.parametrize("days", [0, 4000])
def test_a_life_that_cannot_be_is_refused(directory: Path, days: int) -> None:
    with pytest.raises(ValueError, match="days"):
        lorry("certs", "make", directory, "router", "--days", days)


@pytest.mark.parametrize("host", ["a b", "x/y", "", "h:1"])
def test_a_host_that_is_none_is_named(directory: Path, host: str) -> None:
    with pytest.raises(ValueError, match="host must be a name or an address"):
        lorry("certs", "make", directory, "router", "--host", host)


def test_another_key_in_the_authority_is_noticed(directory: Path, tmp_path: Path) -> None:
    lorry("certs", "make", directory, "router")
    lorry("certs", "make", tmp_path / "other", "router")
    (tmp_path / "other" / "authority" / "ca.key").replace(directory / "authority" / "ca.key")
    with pytest.raises(ValueError, match=r"ca\.key is not the key of"):
        lorry("certs", "make", directory, "worker")


def test_certificates_are_listed_with_what_they_may_do(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lorry("certs", "make", directory, "router", "adapter-store", "--host", "localhost")
    capsys.readouterr()
    lorry("certs", "list", directory)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["router"].split()[-2:] == ["default", "router"]
    assert rows["adapter-store"].split()[1:3] == ["adapter-store,", "localhost"]


@pytest.mark.parametrize(
    "entry",
    [
        {"san": "spiffe://lorry/x", "tenant": "acme", "role": "infer"},
        {"san": "URI:spiffe://lorry/x", "tenant": "acme", "role": "king"},
        {"tenant": "acme", "role": "infer"},
        "acme",
    ],
    ids=str,
)
def test_a_malformed_file_of_certificates_is_named(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "certificates.json"
    path.write_text(json.dumps({"certificates": [entry]}))
    with pytest.raises(ValueError, match=r"certificates\.json"):
        read_certificates(path)
