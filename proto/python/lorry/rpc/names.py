"""Names of adapters, ``tenants/{tenant}/adapters/{adapter}``, and of versions: their sha256."""

import re
from typing import NamedTuple

from lorry.rpc.errors import InvalidRequest

SHA256_BYTES = 32
ID = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_ID = re.compile(ID)
_NAME = re.compile(rf"(?:tenants/({ID})/)?adapters/({ID})")


class AdapterName(NamedTuple):
    tenant: str
    adapter: str

    def __str__(self) -> str:
        return f"tenants/{self.tenant}/adapters/{self.adapter}"

    @classmethod
    def parse(cls, text: str, *, tenant: str, field: str = "adapter") -> "AdapterName":
        """Read a full name, or ``adapters/{adapter}`` as one of `tenant`'s."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise InvalidRequest.of(
                field, f"must be adapters/ID or tenants/ID/adapters/ID, got {text[:200]!r}"
            )
        return cls(match[1] or tenant, match[2])


def check_id(text: str, *, field: str) -> str:
    """Return `text` if it is an id: lower-case letters, digits and inner hyphens, at most 63."""
    if not _ID.fullmatch(text):
        raise InvalidRequest.of(field, f"must match {ID}, got {text[:200]!r}")
    return text


def check_sha256(digest: bytes, *, field: str) -> bytes:
    """Return `digest` if it has the size of one."""
    if len(digest) != SHA256_BYTES:
        raise InvalidRequest.of(field, f"must have {SHA256_BYTES} bytes, got {len(digest)}")
    return digest
