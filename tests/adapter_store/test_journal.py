"""The catalogue on disk after every kind of interruption."""

import errno
import os
from pathlib import Path

import pytest

from lorry.adapter_store import journal as module
from lorry.adapter_store.journal import Journal, JournalDamaged
from lorry.adapter_store.records import Adapter, Change, Version
from lorry.rpc.errors import StoreFull, StoreUnavailable
from lorry.rpc.names import AdapterName


def adapter(adapter_id: str, *, etag: str = "e") -> Adapter:
    version = Version(
        digest=b"d" * 32,
        max_rank=8,
        modules=("q_proj",),
        weights_bytes=10,
        file_bytes=20,
        upload=adapter_id,
        create_time_ns=1,
    )
    return Adapter(
        name=AdapterName("default", adapter_id),
        published=version.digest,
        versions=(version,),
        labels={"team": "ä"},
        create_time_ns=1,
        update_time_ns=2,
        etag=etag,
    )


def change(revision: int, adapter_id: str, *, deleted: bool = False) -> Change:
    content = None if deleted else adapter(adapter_id, etag=str(revision))
    return Change(revision, AdapterName("default", adapter_id), content)


CHANGES = [change(1, "a"), change(2, "b"), change(3, "a"), change(4, "b", deleted=True)]


def written(path: Path, changes: list[Change]) -> bytes:
    journal = Journal(path)
    for each in changes:
        journal.append(each)
    journal.close()
    return path.read_bytes()


def read(path: Path) -> tuple[int, list[Adapter], list[Change]]:
    journal = Journal(path)
    journal.close()
    return journal.base_revision, journal.snapshot, journal.changes


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    written(tmp_path / "catalogue", CHANGES)
    assert read(tmp_path / "catalogue") == (0, [], CHANGES)


def test_a_crash_at_any_byte_of_the_last_line_loses_that_change_only(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    before = written(path, CHANGES[:3])
    after = written(path, CHANGES[3:])
    for cut in range(len(before), len(after)):
        path.write_bytes(after[:cut])
        assert read(path)[2] == CHANGES[:3]
        assert path.read_bytes() == before
    path.write_bytes(after)
    assert read(path)[2] == CHANGES


def test_appending_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    whole = written(path, CHANGES[:2])
    path.write_bytes(whole[:-3])
    written(path, [change(2, "c")])
    assert read(path)[2] == [CHANGES[0], change(2, "c")]


def test_damage_before_the_last_line_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    content = bytearray(written(path, CHANGES))
    for position in (12, content.index(b'"b"')):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(JournalDamaged):
            Journal(path)


def test_old_changes_are_folded_into_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_CHANGES", 3)
    path = tmp_path / "catalogue"
    written(path, [*CHANGES, change(5, "c")])
    base_revision, snapshot, changes = read(path)
    assert base_revision == 4
    assert snapshot == [CHANGES[2].adapter]
    assert changes == [change(5, "c")]


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, StoreFull), (errno.EIO, StoreUnavailable)]
)
def test_a_change_that_could_not_be_synchronised_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    path = tmp_path / "catalogue"
    journal = Journal(path)
    journal.append(CHANGES[0])
    before = path.read_bytes()
    sync, failures = os.fsync, [OSError(number, "no")]

    def failing_once(descriptor: int) -> None:
        if failures:
            raise failures.pop()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_once)
    with pytest.raises(error):
        journal.append(CHANGES[1])
    assert path.read_bytes() == before
    journal.append(change(2, "other"))
    journal.close()
    assert read(path)[2] == [CHANGES[0], change(2, "other")]


def test_a_full_disk_does_not_stop_a_journal_that_only_wants_to_be_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "catalogue"
    journal = Journal(path)
    monkeypatch.setattr(module, "MIN_CHANGES", 1)
    monkeypatch.setattr(module, "write_durably", full)
    for each in CHANGES:
        journal.append(each)
    journal.close()
    assert read(path)[2] == CHANGES
    assert "could not be compacted" in caplog.text
