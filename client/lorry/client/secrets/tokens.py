"""Bearer tokens: their digests in the file that services read, each token in a file of its own."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Self

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

KEY = "tokens"
TOKEN_BYTES = 32
FILE_NAME = "token"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEntry:
    """One token in tokens.json; the services need only digest, tenant and role."""

    name: str
    tenant: str
    role: str
    created: str  # a date
    sha256: str

    @classmethod
    def read(cls, entry: dict[str, Any]) -> Self:
        """Entries that were written by hand may have no name; their digest is one."""
        digest = entry["sha256"]
        return cls(
            name=entry.get("name", digest[:12]),
            tenant=entry["tenant"],
            role=entry["role"],
            created=entry.get("created", ""),
            sha256=digest,
        )


def list_tokens(directory: SecretsDirectory) -> list[TokenEntry]:
    """Raises ValueError if there is no such directory, or its file is damaged."""
    directory.check_exists()
    return [TokenEntry.read(entry) for entry in read_entries(directory.tokens, KEY)]


def make_token(
    directory: SecretsDirectory, name: str, *, tenant: str, role: Role, world_readable: bool
) -> bool:
    """Make the token of `name`; False if it is there already.

    Raises ValueError if the name has a token of another tenant or role.
    """
    check_id(tenant, field="tenant")
    path = directory.of(name) / FILE_NAME
    with directory.changing(make=True):
        entries = list_tokens(directory)
        for entry in entries:
            if entry.name == name:
                _check_same(entry, tenant, role)
                return False
        token = secrets.token_urlsafe(TOKEN_BYTES)
        write(path, token + "\n", mode=PUBLIC if world_readable else PRIVATE)
        entry = TokenEntry(
            name=name,
            tenant=tenant,
            role=role.value,
            created=datetime.now(UTC).date().isoformat(),
            sha256=hashlib.sha256(token.encode()).hexdigest(),
        )
        _write(directory, [*entries, entry])
    return True


def revoke_token(directory: SecretsDirectory, name: str) -> None:
    """Services refuse it from when they read the file again; raises ValueError if there is none."""
    with directory.changing():
        entries = list_tokens(directory)
        kept = [entry for entry in entries if entry.name != name]
        if len(kept) == len(entries):
            raise ValueError(f"there is no token {name!r} in {directory.tokens}")
        _write(directory, kept)
        (directory.path / name / FILE_NAME).unlink(missing_ok=True)


def _check_same(entry: TokenEntry, tenant: str, role: Role) -> None:
    if (entry.tenant, entry.role) != (tenant, role.value):
        raise ValueError(
            f"the token {entry.name!r} is of tenant {entry.tenant} and role {entry.role}; "
            "revoke it first, or choose another name"
        )


def _write(directory: SecretsDirectory, entries: Sequence[TokenEntry]) -> None:
    write_entries(directory.tokens, KEY, [asdict(entry) for entry in entries])
