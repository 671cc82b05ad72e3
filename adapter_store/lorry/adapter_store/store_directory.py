"""Whose directory a ``file://`` backend has: one store's at a time, and of one base model."""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from lorry.adapter_store.durable import write_durably

FORMAT = 1


def locked(path: Path) -> int:
    """A descriptor that holds the lock of a store; raises ValueError while another one has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{path.parent} is in use by another store") from None
    return descriptor


def identity_of(path: Path, model_digest: bytes | None) -> tuple[str, bytes]:
    """The store id and the digest of the base model, made if need be.

    Raises ValueError if they are not those wanted.
    """
    if not path.exists():
        if model_digest is None:
            raise ValueError(f"{path.parent} is not the directory of a store")
        model = model_digest.hex()
        fields = {"format": FORMAT, "store_id": uuid.uuid4().hex, "model_digest": model}
        write_durably(path, json.dumps(fields).encode())
    with opening(path):
        fields = json.loads(path.read_bytes())
        store_id, found = str(fields["store_id"]), bytes.fromhex(fields["model_digest"])
    if fields["format"] != FORMAT:
        raise ValueError(f"{path} has format {fields['format']}, not {FORMAT}")
    if model_digest not in (None, found):
        raise ValueError(f"{path.parent} holds adapters of another base model")
    return store_id, found


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """Have what cannot be opened, or not be understood, name its path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be used: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
