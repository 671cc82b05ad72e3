"""Moves adapters from one backend to another, with their versions, labels, times and etags.

A copy that was broken off goes on where it was: what is there is not sent again, and a content that
is there in part continues.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from crc32c import crc32c

from lorry.adapter_store.backend import Backend, Outdated
from lorry.adapter_store.records import Adapter, Content, UploadRecord, Version
from lorry.rpc.errors import AdapterExists, DigestMismatch
from lorry.rpc.names import AdapterName

PIECE_BYTES = 1 << 20

Progress = Callable[[int], None]  # called with bytes that are there now


@dataclass(frozen=True, slots=True)
class Step:
    """An adapter that differs between source and target."""

    adapter: Adapter
    before: Adapter | None  # what the target has of the name


class Copy:
    """What is to be copied, by name.

    Raises ValueError for another base model, and without `replace` AdapterExists for the first name
    that the target has otherwise.
    """

    def __init__(self, source: Backend, target: Backend, *, replace: bool) -> None:
        if source.model_digest != target.model_digest:
            raise ValueError("the two hold adapters of different base models")
        self._source, self._target = source, target
        there = {adapter.name: adapter for adapter in target.load().adapters}
        self._held = {v.digest for adapter in there.values() for v in adapter.versions}
        adapters = sorted(source.load().adapters, key=lambda adapter: adapter.name)
        steps = [Step(adapter, there.get(adapter.name)) for adapter in adapters]
        self.steps = [step for step in steps if step.before != step.adapter]
        for step in self.steps:
            if step.before is not None and not replace:
                name = str(step.adapter.name)
                raise AdapterExists(f"the target has another {name}", adapter=name)

    def num_bytes(self, step: Step) -> int:
        """Of the contents that the target lacks."""
        return sum(version.file_bytes for version in self._missing(step))

    def run(self, step: Step, progress: Progress) -> None:
        """Copy the contents, then publish the name, then let go of what brought the contents.

        Raises DigestMismatch or VersionNotFound for what the source has damaged or lost.
        """
        name, missing = step.adapter.name, self._missing(step)
        keys = [copy_content(self._source, self._target, name, v, progress) for v in missing]
        self._commit(step)
        self._held.update(version.digest for version in missing)
        for key in keys:
            self._target.drop_upload(key)

    def _missing(self, step: Step) -> list[Version]:
        return [v for v in step.adapter.versions if v.digest not in self._held]

    def _commit(self, step: Step) -> None:
        name = step.adapter.name
        try:
            self._target.commit(name, step.before, step.adapter)
        except Outdated:
            raise AdapterExists(f"{name} was changed meanwhile; copy again") from None


def copy_content(
    source: Backend, target: Backend, name: AdapterName, version: Version, progress: Progress
) -> str:
    """Bring a verified content to the target; returns the key of the upload that holds it there.

    Raises DigestMismatch if the source's is damaged, VersionNotFound if it has none.
    """
    with source.weights(version.digest) as (content, path):
        record = _record(name, version, content, path.stat().st_size)
        try:
            _send(target, record, path, content.file_crc32c, progress)
        except DigestMismatch:
            target.drop_upload(record.key)
            raise
        target.keep(record.key, version.digest, content)
    return record.key


def _send(
    target: Backend, record: UploadRecord, path: Path, file_crc32c: int, progress: Progress
) -> None:
    """Append what the target lacks; every byte is read, so that the whole file is verified."""
    received_bytes = _begun(target, record)
    checksum = offset = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            checksum = crc32c(piece, checksum)
            end = offset + len(piece)
            if end > received_bytes:
                start = max(offset, received_bytes)
                target.append(record.key, start, piece[start - offset :])
            offset = end
            progress(len(piece))
    if checksum != file_crc32c:
        raise DigestMismatch(f"the weights of {record.name} are damaged at the source")


def _begun(target: Backend, record: UploadRecord) -> int:
    """Begin the upload unless it is under way; returns the bytes that it has."""
    while True:
        found = target.find_upload(record.key)
        if found is not None:
            return found.received_bytes
        try:
            num_begun = target.uploads_of(record.name.tenant).num_begun
            target.create_upload(record, num_begun=num_begun)
        except Outdated:
            continue
        return 0


def _record(
    name: AdapterName, version: Version, content: Content, weights_bytes: int
) -> UploadRecord:
    text = f"copy {name} {version.digest.hex()} {content.file_crc32c}"
    return UploadRecord(
        key=sha256(text.encode()).hexdigest(),
        name=name,
        spec=content.spec,
        weights_bytes=weights_bytes,
        weights_sha256=version.weights_sha256,
        labels={},
        expected_etag="",
        create_time_ns=version.create_time_ns,
    )
