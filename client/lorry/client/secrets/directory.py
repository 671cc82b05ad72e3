"""The directory in which a deployment's secrets lie, one part of it for each that needs it.

    authority/  ca.crt, ca.key        stays with the operator
    callers/    tokens.json, certificates.json
                                      for every service: who may call; holds no secret
    NAME/       tls.crt, tls.key, ca.crt, token
                                      for the service or client of that name alone

A part is mounted as a directory, so that a container sees files that are replaced. Every file is
replaced as a whole. The directory itself is closed to other users.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorry.rpc.names import check_id

PRIVATE, PUBLIC = 0o600, 0o644
RESERVED = ("authority", "callers")  # no names of services and clients


class SecretsDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.authority = path / "authority"
        self.tokens = path / "callers" / "tokens.json"
        self.certificates = path / "callers" / "certificates.json"

    def of(self, name: str) -> Path:
        """The part of a service or client; raises ValueError for what cannot be a name."""
        if name in RESERVED:
            raise ValueError(f"name must not be {' or '.join(RESERVED)}, got {name!r}")
        return self.path / check_id(name, field="name")

    @property
    def names(self) -> Sequence[str]:
        """Of all that have a part."""
        parts = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(part.name for part in parts if part.is_dir() and part.name not in RESERVED)

    def check_exists(self) -> None:
        """Raise ValueError if there is no such directory."""
        if not self.path.is_dir():
            raise ValueError(f"there is no directory {self.path}")

    @contextlib.contextmanager
    def changing(self, *, make: bool = False) -> Iterator[None]:
        """Only one command changes the directory at a time; `make` makes it if there is none."""
        if make:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.check_exists()
        directory = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)


def read_entries(path: Path, key: str) -> list[dict[str, Any]]:
    """The list under `key` of a JSON file of callers; none if there is no file."""
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text())[key]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of {key}: {error!r}") from error
    return entries


def write_entries(path: Path, key: str, entries: Sequence[Mapping[str, Any]]) -> None:
    write(path, json.dumps({key: entries}, indent=2) + "\n", mode=PUBLIC)


def write(path: Path, text: str, *, mode: int) -> None:
    """Replace a file as a whole, durably. No other user can read a private one at any moment."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
