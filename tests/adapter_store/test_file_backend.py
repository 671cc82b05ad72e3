"""The directory of a store: what is durable, what is cleaned up, who may open it."""

import os
import resource
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from lorry.adapter_store import durable
from lorry.adapter_store.file_backend import FileBackend
from lorry.adapter_store.peft_config import resolve
from lorry.adapter_store.records import Content, UploadRecord
from lorry.rpc.errors import StoreFull, StoreUnavailable, VersionNotFound
from lorry.rpc.names import AdapterName
from tests.support.adapters import TINY, lora_config

SPEC = resolve(lora_config(), TINY)
DIGEST = b"d" * 32
UPLOAD = UploadRecord(
    key="k" * 64,
    name=AdapterName("default", "sql"),
    spec=SPEC,
    weights_bytes=6,
    weights_sha256=b"s" * 32,
    labels={"team": "data"},
    expected_etag="",
    create_time_ns=1,
)


def opened(path: Path) -> FileBackend:
    return FileBackend(path, model_digest=b"m" * 32)


def test_uploads_and_contents_are_found_again(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    store_id = backend.load().store_id
    backend.create_upload(UPLOAD)
    backend.append(UPLOAD.key, 0, b"abc")
    backend.append(UPLOAD.key, 3, b"def")
    backend.keep(UPLOAD.key, DIGEST, Content(SPEC, 7))
    backend.close()
    backend = opened(tmp_path)
    loaded = backend.load()
    assert loaded.store_id == store_id
    assert backend.unreferenced() == [DIGEST]
    assert loaded.uploads == [UPLOAD]
    found = backend.find_upload(UPLOAD.key)
    assert found is not None
    assert (found.record, found.received_bytes) == (UPLOAD, 6)
    backend.drop_upload(UPLOAD.key)
    with backend.weights(DIGEST) as (content, path):
        assert content == Content(SPEC, 7)
        assert path.read_bytes() == b"abcdef"
    backend.drop(DIGEST)
    with pytest.raises(VersionNotFound), backend.weights(DIGEST):
        raise AssertionError
    backend.close()


class Pieces(FileIO):
    """A file that notes how many bytes each write has."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.sizes: list[int] = []

    def write(self, data: Any) -> int:
        self.sizes.append(len(data))
        return super().write(data)


def test_a_chunk_is_written_in_pieces_between_which_others_run(tmp_path: Path) -> None:
    chunk = bytes(range(256)) * 1000
    with Pieces(tmp_path / "part") as file:
        durable.write_in_pieces(file, chunk)
    assert file.sizes == [65536, 65536, 65536, 59392]
    assert (tmp_path / "part").read_bytes() == chunk


def test_nothing_stays_of_a_chunk_whose_last_piece_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "WRITE_BYTES", 2)
    backend = opened(tmp_path)
    backend.create_upload(UPLOAD)
    backend.append(UPLOAD.key, 0, b"a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))
    try:
        with pytest.raises(StoreUnavailable):
            backend.append(UPLOAD.key, 1, b"bcdef")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    backend.append(UPLOAD.key, 1, b"bcdef")
    backend.keep(UPLOAD.key, DIGEST, Content(SPEC, 7))
    with backend.weights(DIGEST) as (_, path):
        assert path.read_bytes() == b"abcdef"
    backend.close()


def test_a_content_is_synchronised_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was synchronised when the name appeared is what a power cut leaves."""
    synchronised: set[int] = set()
    sync = os.fsync

    def recording(descriptor: int) -> None:
        sync(descriptor)
        synchronised.add(os.fstat(descriptor).st_ino)

    def checked(self: Path, target: Path) -> Path:
        if target.name == DIGEST.hex():
            inodes = {path.stat().st_ino for path in (self, *self.iterdir())}
            assert inodes <= synchronised
        return rename(self, target)

    rename = Path.rename
    backend = opened(tmp_path)
    backend.create_upload(UPLOAD)
    backend.append(UPLOAD.key, 0, b"abcdef")
    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(Path, "rename", checked)
    backend.keep(UPLOAD.key, DIGEST, Content(SPEC, 7))
    assert (tmp_path / "versions").stat().st_ino in synchronised
    backend.close()


def test_an_uploads_bytes_are_synchronised_while_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents are kept one at a time, and gigabytes take seconds to reach a disk."""
    backend = opened(tmp_path)
    backend.create_upload(UPLOAD)
    backend.append(UPLOAD.key, 0, b"abcdef")
    synchronised: list[int] = []
    sync = os.fsync

    def recording(descriptor: int) -> None:
        sync(descriptor)
        synchronised.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", recording)
    with backend.staged(UPLOAD.key) as path:
        assert synchronised == [path.stat().st_ino]
    backend.close()


def test_what_a_crash_left_half_done_is_removed(tmp_path: Path) -> None:
    opened(tmp_path).close()
    for path in (
        tmp_path / "versions" / f".{DIGEST.hex()}",
        tmp_path / "uploads" / "unacknowledged",
    ):
        path.mkdir()
        (path / "weights.part").write_bytes(b"x")
    backend = opened(tmp_path)
    loaded = backend.load()
    assert (backend.unreferenced(), loaded.uploads) == ([], [])
    assert not list((tmp_path / "versions").iterdir())
    assert not list((tmp_path / "uploads").iterdir())
    backend.close()


def test_a_content_is_kept_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(tmp_path)
    backend.create_upload(UPLOAD)
    backend.append(UPLOAD.key, 0, b"abcdef")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr("lorry.adapter_store.file_backend.write_durably", full)
        with pytest.raises(StoreFull):
            backend.keep(UPLOAD.key, DIGEST, Content(SPEC, 7))
    backend.keep(UPLOAD.key, DIGEST, Content(SPEC, 7))
    assert backend.unreferenced() == [DIGEST]
    backend.close()


def test_an_upload_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    with pytest.raises(StoreFull):
        backend.create_upload(replace(UPLOAD, weights_bytes=1 << 60))
    backend.close()


def test_a_directory_has_one_store_at_a_time_and_one_base_model(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    with pytest.raises(ValueError, match="in use by another store"):
        opened(tmp_path)
    backend.close()
    with pytest.raises(ValueError, match="another base model"):
        FileBackend(tmp_path, model_digest=b"other" * 4)
    opened(tmp_path).close()


@pytest.mark.parametrize(
    "path",
    ["versions", "store.json", "versions/notes.txt", "uploads/k/upload.json"],
)
def test_what_is_damaged_or_strange_is_named(tmp_path: Path, path: str) -> None:
    strange = tmp_path / path
    strange.parent.mkdir(parents=True, exist_ok=True)
    strange.write_text("{")
    with pytest.raises(ValueError, match=str(strange)):
        opened(tmp_path).load()


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    durable.write_durably(path, b"old")

    def failing(descriptor: int) -> None:
        raise OSError(5, "no")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="no"):
        durable.write_durably(path, b"new")
    assert path.read_bytes() == b"old"
