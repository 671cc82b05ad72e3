import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorry.rpc.huge_pages import HUGE_PAGE_BYTES, allocate, map_file

NUM_BYTES = 2 * HUGE_PAGE_BYTES + 12_345


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT, 0o600)
    yield opened
    os.close(opened)


@pytest.mark.parametrize("num_bytes", [1, HUGE_PAGE_BYTES, NUM_BYTES])
def test_a_new_file_is_zeroed_and_has_all_its_memory(descriptor: int, num_bytes: int) -> None:
    allocate(descriptor, num_bytes)
    assert os.pread(descriptor, num_bytes + 1, 0) == bytes(num_bytes)
    assert os.fstat(descriptor).st_blocks * 512 >= num_bytes


def test_a_mapping_shows_what_is_written_and_outlives_its_file(
    descriptor: int, tmp_path: Path
) -> None:
    allocate(descriptor, NUM_BYTES)
    content = map_file(descriptor, NUM_BYTES)
    written = os.urandom(NUM_BYTES)
    assert os.pwrite(descriptor, written, 0) == NUM_BYTES
    (tmp_path / "image").unlink()
    assert content.readonly
    assert bytes(content) == written


def test_a_file_is_mapped_until_its_last_view_goes(descriptor: int, tmp_path: Path) -> None:
    allocate(descriptor, NUM_BYTES)
    content = map_file(descriptor, NUM_BYTES)
    part = content[5:]
    content.release()
    assert [start % HUGE_PAGE_BYTES for start in _starts(tmp_path / "image")] == [0]
    part.release()
    assert _starts(tmp_path / "image") == []


def test_a_file_that_cannot_be_mapped_leaves_nothing_mapped() -> None:
    reading, writing = os.pipe()
    before = len(Path("/proc/self/maps").read_text())
    with pytest.raises(OSError, match="cannot be mapped"):
        map_file(reading, 1)
    assert len(Path("/proc/self/maps").read_text()) == before
    os.close(reading)
    os.close(writing)


def _starts(path: Path) -> list[int]:
    """Where the file is mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [int(line.split("-")[0], 16) for line in lines if line.endswith(str(path))]
