"""How much shared memory page images may take."""

import shutil
from pathlib import Path

DEFAULT_BYTES = 4 << 30


def ram_budget(directory: Path, asked_bytes: int | None) -> int:
    """The budget in a directory of a tmpfs: by default 4 GiB, or half of it where that is less.

    Raises ValueError if more is asked for than the file system can ever hold.
    """
    total_bytes = shutil.disk_usage(directory).total
    if asked_bytes is None:
        return min(DEFAULT_BYTES, total_bytes // 2)
    if asked_bytes > total_bytes:
        raise ValueError(
            f"ram_bytes must be at most {total_bytes}, the size of the file system of "
            f"{directory}, got {asked_bytes}"
        )
    return asked_bytes
