"""The ``file://`` backend: a directory of one store on this machine.

store.json              format, store id and digest of the base model
lock                    held while a store uses the directory
catalogue               names and their changes (see `journal`)
versions/DIGEST/        content.json, weights.safetensors
uploads/KEY/            upload.json, weights.part
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from lorry.adapter_store.backend import Loaded
from lorry.adapter_store.durable import sync_directory, sync_file, write_durably
from lorry.adapter_store.journal import Journal
from lorry.adapter_store.lora import LoraSpec
from lorry.adapter_store.records import (
    Change,
    Content,
    UploadRecord,
    upload_from_json,
    upload_to_json,
)
from lorry.rpc.errors import StoreFull, StoreUnavailable, VersionNotFound

FORMAT = 1
SPARE_BYTES = 64 << 20  # for the catalogue, so that a full disk can still be cleared by deletes
CONTENT, WEIGHTS = "content.json", "weights.safetensors"
UPLOAD, PART = "upload.json", "weights.part"


class FileBackend:
    """Implements `Backend`. Raises ValueError if the directory is another store's, or damaged."""

    def __init__(self, directory: Path, *, model_digest: bytes) -> None:
        self._directory = directory
        self._versions, self._uploads = directory / "versions", directory / "uploads"
        with contextlib.ExitStack() as stack, _opening(directory):
            for path in (directory, self._versions, self._uploads):
                path.mkdir(mode=0o750, parents=True, exist_ok=True)
            stack.callback(os.close, _locked(directory / "lock"))
            self._store_id = _store_id(directory / "store.json", model_digest.hex())
            self._journal = Journal(directory / "catalogue")
            stack.callback(self._journal.close)
            sync_directory(directory)
            self._held = stack.pop_all()

    def load(self) -> Loaded:
        for leftover in self._versions.glob(".*"):
            shutil.rmtree(leftover)
        journal = self._journal
        return Loaded(
            self._store_id,
            journal.base_revision,
            journal.snapshot,
            journal.changes,
            {_digest_of(path) for path in self._versions.iterdir()},
            list(self._stored_uploads()),
        )

    def commit(self, change: Change) -> None:
        self._journal.append(change)

    def create_upload(self, upload: UploadRecord) -> None:
        free_bytes = shutil.disk_usage(self._directory).free - SPARE_BYTES
        if upload.weights_bytes > free_bytes:
            raise StoreFull("the store's disk has no room for the weights")
        directory = self._uploads / upload.key
        with _disk_errors():
            directory.mkdir(mode=0o750)
            (directory / PART).touch()
            write_durably(directory / UPLOAD, json.dumps(upload_to_json(upload)).encode())

    def append(self, key: str, data: bytes) -> None:
        with _disk_errors(), (self._uploads / key / PART).open("ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(start)
                raise

    @contextlib.contextmanager
    def staged(self, key: str) -> Iterator[Path]:
        yield self._uploads / key / PART

    def keep(self, key: str, digest: bytes, content: Content) -> None:
        """The same steps whether or not it is there: their time would tell what others have."""
        target = self._versions / digest.hex()
        new = self._versions / f".{digest.hex()}"
        shutil.rmtree(new, ignore_errors=True)
        with _disk_errors():
            new.mkdir(mode=0o750)
            part = self._uploads / key / PART
            sync_file(part)
            os.link(part, new / WEIGHTS)
            fields = {"spec": content.spec.to_json(), "file_crc32c": content.file_crc32c}
            write_durably(new / CONTENT, json.dumps(fields).encode())
            if target.exists():
                shutil.rmtree(new)
            else:
                new.rename(target)
            sync_directory(self._versions)

    def drop_upload(self, key: str) -> None:
        shutil.rmtree(self._uploads / key, ignore_errors=True)

    @contextlib.contextmanager
    def weights(self, digest: bytes) -> Iterator[tuple[Content, Path]]:
        directory = self._versions / digest.hex()
        try:
            fields = json.loads((directory / CONTENT).read_bytes())
        except FileNotFoundError as error:
            raise VersionNotFound(f"no version {digest.hex()}") from error
        spec = LoraSpec.from_json(fields["spec"])
        yield Content(spec, fields["file_crc32c"]), directory / WEIGHTS

    def drop(self, digest: bytes) -> None:
        gone = self._versions / f".{digest.hex()}"
        with contextlib.suppress(FileNotFoundError):
            (self._versions / digest.hex()).rename(gone)
            shutil.rmtree(gone)

    def close(self) -> None:
        self._held.close()

    def _stored_uploads(self) -> Iterator[tuple[UploadRecord, int]]:
        """Those whose creation was acknowledged; the others are removed."""
        for directory in self._uploads.iterdir():
            path = directory / UPLOAD
            if path.exists():
                with _opening(path):
                    upload = upload_from_json(json.loads(path.read_bytes()))
                    part_bytes = (directory / PART).stat().st_size
                yield upload, part_bytes
            else:
                shutil.rmtree(directory)


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Have what cannot be opened, or not be understood, name its path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be used: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _digest_of(path: Path) -> bytes:
    try:
        return bytes.fromhex(path.name)
    except ValueError as error:
        raise ValueError(f"{path} is not a version; move it elsewhere") from error


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreUnavailable
        raise kind(f"the store's disk failed: {error.strerror}") from error


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{path.parent} is in use by another store") from None
    return descriptor


def _store_id(path: Path, model_digest: str) -> str:
    if not path.exists():
        fields = {"format": FORMAT, "store_id": uuid.uuid4().hex, "model_digest": model_digest}
        write_durably(path, json.dumps(fields).encode())
    with _opening(path):
        fields = json.loads(path.read_bytes())
        store_id = str(fields["store_id"])
    if fields["format"] != FORMAT:
        raise ValueError(f"{path} has format {fields['format']}, not {FORMAT}")
    if fields["model_digest"] != model_digest:
        raise ValueError(f"{path.parent} holds adapters of another base model")
    return store_id
