"""The files that say who may call: digests of tokens, and names in certificates.

tokens.json is ``{"tokens": [{"sha256": hex, "tenant": id, "role": role}, ...]}``: digests only.
certificates.json is ``{"certificates": [{"san": name, "tenant": id, "role": role}, ...]}``, where a
name is ``URI:spiffe://lorry/router`` or ``DNS:router.example.com``, as a certificate's subject
alternative names have it. Entries may have more fields, for their owners' use.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lorry.rpc.errors import InvalidRequest
from lorry.rpc.identity import Caller, Role
from lorry.rpc.names import check_id

SAN_KINDS = ("URI:", "DNS:")
Key = TypeVar("Key")


def read_tokens(path: Path) -> dict[bytes, Caller]:
    """Callers by the sha256 of their token; raises ValueError naming what is malformed."""
    return _read(path, "tokens", lambda entry: _digest(entry["sha256"]))


def read_certificates(path: Path) -> dict[str, Caller]:
    """Callers by a name in their certificate; raises ValueError naming what is malformed."""
    return _read(path, "certificates", lambda entry: _san(entry["san"]))


def _read(path: Path, key: str, key_of: Callable[[Any], Key]) -> dict[Key, Caller]:
    try:
        entries = json.loads(path.read_text())[key]
        callers = {key_of(entry): _caller(entry) for entry in entries}
        if len(callers) < len(entries):
            raise ValueError("two entries are of the same caller")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        raise ValueError(f"file of {key} {path}: {error!r}") from error
    return callers


def _digest(text: str) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError(f"sha256 must be 64 hex digits, got {len(text)}")
    return digest


def _san(text: str) -> str:
    if not text.startswith(SAN_KINDS):
        raise ValueError(f"san must begin with {' or '.join(SAN_KINDS)}, got {text!r}")
    return text


def _caller(entry: Mapping[str, str]) -> Caller:
    return Caller(check_id(entry["tenant"], field="tenant"), frozenset({Role(entry["role"])}))
