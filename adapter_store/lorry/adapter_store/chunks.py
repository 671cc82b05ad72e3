"""Pieces of weights and images on their way in or out."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from crc32c import crc32c

from lorry.adapter_store.tasks import Tasks


class Chunk(NamedTuple):
    offset: int
    data: bytes
    crc32c: int  # as its sender says


async def read_chunks(path: Path, offsets: range) -> AsyncIterator[Chunk]:
    """A file's chunks that begin at `offsets`; the next is read in a thread while one is sent."""
    tasks = Tasks()
    waiting = iter(offsets)

    def read_next() -> asyncio.Task[Chunk] | None:
        offset = next(waiting, None)
        if offset is None:
            return None
        return tasks.start(asyncio.to_thread(_read, path, offset, offsets.step))

    ahead = read_next()
    while ahead is not None:
        chunk = await ahead
        ahead = read_next()
        yield chunk


def _read(path: Path, offset: int, num_bytes: int) -> Chunk:
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), num_bytes, offset)
    return Chunk(offset, data, crc32c(data))
