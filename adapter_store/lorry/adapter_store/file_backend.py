"""The ``file://`` backend: a directory of one store on this machine.

store.json              format, store id and digest of the base model
lock                    held while a store uses the directory
catalogue               names and their changes (see `journal`)
versions/DIGEST/        content.json, weights.safetensors
uploads/KEY/            upload.json, weights.part
quarantine/DIGEST/      what a version was found damaged as
"""

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorry.adapter_store.backend import Loaded, Position, StoredUpload, UnderWay
from lorry.adapter_store.durable import (
    disk_errors,
    sync_directory,
    sync_file,
    write_durably,
    write_in_pieces,
)
from lorry.adapter_store.journal import Journal
from lorry.adapter_store.lora import LoraSpec
from lorry.adapter_store.records import (
    Adapter,
    Change,
    Content,
    UploadRecord,
    upload_from_json,
    upload_to_json,
)
from lorry.adapter_store.store_directory import identity_of, locked, opening
from lorry.rpc.errors import (
    DigestMismatch,
    OffsetMismatch,
    StoreFull,
    UploadNotFound,
    VersionNotFound,
)
from lorry.rpc.names import AdapterName

SPARE_BYTES = 64 << 20  # for the catalogue, so that a full disk can still be cleared by deletes
CONTENT, WEIGHTS = "content.json", "weights.safetensors"
UPLOAD, PART = "upload.json", "weights.part"


@dataclass(slots=True)
class FileUpload:
    record: UploadRecord
    received_bytes: int
    active_s: float  # when it was last moved on, by the backend's clock


class FileBackend:
    """Implements `Backend`. Raises ValueError if the directory is another store's, or damaged."""

    shared = False

    def __init__(
        self,
        directory: Path,
        *,
        model_digest: bytes | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._versions, self._uploads = directory / "versions", directory / "uploads"
        self._quarantine = directory / "quarantine"
        self._digests: set[bytes] = set()  # of all contents
        self._references: Counter[bytes] = Counter()  # names that hold each
        self._under_way: dict[str, FileUpload] = {}
        with contextlib.ExitStack() as stack, opening(directory):
            for path in (directory, self._versions, self._uploads, self._quarantine):
                path.mkdir(mode=0o750, parents=True, exist_ok=True)
            stack.callback(os.close, locked(directory / "lock"))
            identity = identity_of(directory / "store.json", model_digest)
            self._store_id, self.model_digest = identity
            self._journal = Journal(directory / "catalogue")
            stack.callback(self._journal.close)
            sync_directory(directory)
            self._held = stack.pop_all()

    def load(self) -> Loaded:
        for leftover in self._versions.glob(".*"):
            shutil.rmtree(leftover)
        journal = self._journal
        adapters = list(journal.adapters.values())
        kept = (*self._versions.iterdir(), *self._quarantine.iterdir())
        self._digests = {_digest_of(path) for path in kept}
        self._references = Counter(v.digest for adapter in adapters for v in adapter.versions)
        self._under_way = {upload.record.key: upload for upload in self._stored_uploads()}
        return Loaded(
            self._store_id,
            Position(journal.revision),
            adapters,
            journal.changes,
            [upload.record for upload in self._under_way.values()],
        )

    def commit(self, name: AdapterName, before: Adapter | None, after: Adapter | None) -> Change:
        change = Change(self._journal.revision + 1, name, after)
        self._journal.append(change)
        self._references.update(v.digest for v in (after.versions if after else ()))
        self._references.subtract(v.digest for v in (before.versions if before else ()))
        return change

    def changes(self, after: Position) -> list[Change]:
        """None: nobody else writes here."""
        return []

    wait_for_changes = changes

    def uploads_of(self, tenant: str) -> UnderWay:
        records = [upload.record for upload in list(self._under_way.values())]
        return UnderWay([record for record in records if record.name.tenant == tenant], 0)

    def create_upload(self, upload: UploadRecord, *, num_begun: int = 0) -> None:
        free_bytes = shutil.disk_usage(self._directory).free - SPARE_BYTES
        if upload.weights_bytes > free_bytes:
            raise StoreFull("the store's disk has no room for the weights")
        directory = self._uploads / upload.key
        with disk_errors():
            directory.mkdir(mode=0o750)
            (directory / PART).touch()
            write_durably(directory / UPLOAD, json.dumps(upload_to_json(upload)).encode())
        self._under_way[upload.key] = FileUpload(upload, 0, self._clock())

    def find_upload(self, key: str) -> StoredUpload | None:
        upload = self._under_way.get(key)
        if upload is None:
            return None
        idle_s = self._clock() - upload.active_s
        return StoredUpload(upload.record, upload.received_bytes, idle_s)

    def append(self, key: str, offset: int, data: bytes | memoryview) -> None:
        upload = self._under_way.get(key)
        if upload is None:
            raise UploadNotFound("the upload has expired")
        if offset != upload.received_bytes:
            raise OffsetMismatch.at(upload.received_bytes, offset)
        with disk_errors(), (self._uploads / key / PART).open("ab", buffering=0) as file:
            start = file.tell()
            try:
                write_in_pieces(file, data)
            except OSError:
                file.truncate(start)
                raise
        upload.received_bytes += len(data)
        upload.active_s = self._clock()

    @contextlib.contextmanager
    def staged(self, key: str) -> Iterator[Path]:
        """Synchronised by then, which takes seconds for gigabytes: `keep` is done one at a time."""
        part = self._uploads / key / PART
        with disk_errors():
            sync_file(part)
        yield part

    def keep(self, key: str, digest: bytes, content: Content) -> None:
        """The same steps whether or not it is there: their time would tell what others have."""
        target = self._versions / digest.hex()
        new = self._versions / f".{digest.hex()}"
        shutil.rmtree(new, ignore_errors=True)
        with disk_errors():
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
        self._digests.add(digest)
        shutil.rmtree(self._quarantine / digest.hex(), ignore_errors=True)

    def drop_upload(self, key: str) -> None:
        """Its record goes first: a crash in between leaves what the next start removes."""
        self._under_way.pop(key, None)
        directory = self._uploads / key
        with contextlib.suppress(OSError):
            (directory / UPLOAD).unlink(missing_ok=True)
            shutil.rmtree(directory)

    def drop_expired(self, idle_s: float, *, busy: Collection[str]) -> list[str]:
        last_s = self._clock() - idle_s
        uploads = list(self._under_way.items())
        expired = [key for key, u in uploads if u.active_s <= last_s and key not in busy]
        for key in expired:
            self.drop_upload(key)
        return expired

    @contextlib.contextmanager
    def weights(self, digest: bytes) -> Iterator[tuple[Content, Path]]:
        directory = self._versions / digest.hex()
        try:
            fields = json.loads((directory / CONTENT).read_bytes())
        except FileNotFoundError as error:
            if (self._quarantine / digest.hex()).exists():
                raise DigestMismatch.of_version(digest) from error
            raise VersionNotFound(f"no version {digest.hex()}", version=digest.hex()) from error
        spec = LoraSpec.from_json(fields["spec"])
        yield Content(spec, fields["file_crc32c"]), directory / WEIGHTS

    def lease(self, digests: Collection[bytes]) -> None:
        """Nothing to do: nobody else drops contents here."""

    def unreferenced(self) -> list[bytes]:
        return [digest for digest in list(self._digests) if not self._references[digest] > 0]

    def drop(self, digest: bytes) -> None:
        self._digests.discard(digest)
        gone = self._versions / f".{digest.hex()}"
        with contextlib.suppress(FileNotFoundError):
            (self._versions / digest.hex()).rename(gone)
            shutil.rmtree(gone)
        shutil.rmtree(self._quarantine / digest.hex(), ignore_errors=True)

    def quarantine(self, digest: bytes) -> None:
        aside = self._quarantine / digest.hex()
        with disk_errors():
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                (self._versions / digest.hex()).rename(aside)
            sync_directory(self._versions)

    def problems(self) -> list[str]:
        """None: what does not fit together does not open."""
        return []

    def close(self) -> None:
        self._held.close()

    def _stored_uploads(self) -> Iterator[FileUpload]:
        """Those whose creation was acknowledged; the others are removed."""
        for directory in self._uploads.iterdir():
            path = directory / UPLOAD
            if path.exists():
                with opening(path):
                    upload = upload_from_json(json.loads(path.read_bytes()))
                    part_bytes = (directory / PART).stat().st_size
                yield FileUpload(upload, part_bytes, self._clock())
            else:
                shutil.rmtree(directory)


def _digest_of(path: Path) -> bytes:
    try:
        return bytes.fromhex(path.name)
    except ValueError as error:
        raise ValueError(f"{path} is not a version; move it elsewhere") from error
