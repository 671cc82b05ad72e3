"""SIGKILL at every step of uploads, a publish, an update and a delete: what was acknowledged is
there afterwards, no byte is wrong, and the work can go on."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorry.adapter_store.file_backend import FileBackend
from tests.support.command import child_environment
from tests.support.crashing import MODEL, NAME, PARTS, upload_of, work

MIN_POINTS = 60


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory that costs nothing to synchronise: a killed process loses no written page."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_no_crash_loses_what_was_acknowledged(memory: Path) -> None:
    command = [sys.executable, "-m", "tests.support.crashing", str(memory)]
    output = subprocess.check_output(command, env=child_environment(), text=True, timeout=200)
    points = [json.loads(line) for line in output.splitlines()]
    assert len(points) > MIN_POINTS
    assert [point["survived"] for point in points].count(True) == 2
    for point in points:
        directory, acknowledged = Path(point["directory"]), point["acknowledged"]
        directory.mkdir(exist_ok=True)
        check(directory, acknowledged)
        if "described" not in acknowledged:
            go_on(directory)


def check(directory: Path, acknowledged: list[str]) -> None:
    """What the next life of a store finds."""
    backend = FileBackend(directory, model_digest=MODEL)
    loaded = backend.load()
    for adapter in loaded.adapters:
        for version in adapter.versions:
            with backend.weights(version.digest) as (_, weights):
                assert weights.read_bytes() == b"".join(PARTS[version.digest])
    published = [step.split()[1] for step in acknowledged if step.startswith("published")]
    names = {adapter.name: adapter for adapter in loaded.adapters}
    if published and "described" not in acknowledged:
        # The last one that was acknowledged, or the one that was about to be.
        assert names[NAME].published[:1].decode() in (published[-1], "2")
    if "described" in acknowledged and NAME in names:
        assert names[NAME].description == "an update"
    if "deleted" in acknowledged:
        assert not names
    check_uploads(backend, acknowledged, published)
    backend.close()


def check_uploads(backend: FileBackend, acknowledged: list[str], published: list[str]) -> None:
    """Bytes that were acknowledged are there until their version is published."""
    for digest, parts in PARTS.items():
        letter, key = digest[:1].decode(), upload_of(digest).key
        if f"created {letter}" not in acknowledged or letter in published:
            continue
        received = [int(s.split()[2]) for s in acknowledged if s.startswith(f"received {letter}")]
        found = backend.find_upload(key)
        if found is None:  # it was published, and only the acknowledgement is missing
            names = {version.upload for a in backend.load().adapters for version in a.versions}
            assert key in names
            continue
        assert found.received_bytes >= max(received, default=0)
        with backend.staged(key) as part:
            assert part.read_bytes() == b"".join(parts)[: found.received_bytes]


def go_on(directory: Path) -> None:
    """Drop the uploads under way, as if they had expired, and do all of the work."""
    backend = FileBackend(directory, model_digest=MODEL)
    for upload in backend.load().uploads:
        backend.drop_upload(upload.key)
    backend.close()
    assert list(work(directory))[-1] == "closed"
    assert not list((directory / "versions").iterdir())
    assert not list((directory / "uploads").iterdir())
