import os
from pathlib import Path

import pytest

from lorry.rpc.shared_memory import SharedFileRefused, open_shared, shm_namespace_id


def test_a_file_is_mapped_read_only_and_outlives_its_name(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"weights")
    with open_shared(tmp_path, "image", 7) as mapping:
        path.unlink()
        assert bytes(mapping) == b"weights"
        assert mapping.readonly


@pytest.mark.parametrize("name", ["", ".", "..", "../image", "/etc/passwd", "a\0b", "absent"])
def test_a_name_that_is_no_file_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SharedFileRefused):
        open_shared(tmp_path, name, 1)


def test_links_directories_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "directory", "pipe"):
        with pytest.raises(SharedFileRefused):
            open_shared(tmp_path, name, 1)


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"1234")
    for num_bytes in (0, 3, 5):
        with pytest.raises(SharedFileRefused, match="4 bytes"):
            open_shared(tmp_path, "image", num_bytes)


def test_the_namespace_is_equal_for_one_directory_and_another_for_another_file_system(
    tmp_path: Path,
) -> None:
    assert shm_namespace_id(tmp_path) == shm_namespace_id(tmp_path / ".")
    assert shm_namespace_id(tmp_path) != shm_namespace_id(Path("/proc"))
    assert shm_namespace_id(tmp_path / "absent") == ""
