"""Pieces of images on their way out."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from crc32c import crc32c

from lorry.adapter_store.tasks import Tasks
from lorry.rpc.weight_chunk import Chunk, encode_chunk


async def read_messages(path: Path, offsets: range) -> AsyncIterator[bytes]:
    """The messages with a file's chunks that begin at `offsets`.

    The next is read in a thread while one is sent.
    """
    tasks = Tasks()
    waiting = iter(offsets)

    def read_next() -> asyncio.Task[bytes] | None:
        offset = next(waiting, None)
        if offset is None:
            return None
        return tasks.start(asyncio.to_thread(_read, path, offset, offsets.step))

    ahead = read_next()
    while ahead is not None:
        message = await ahead
        ahead = read_next()
        yield message


def _read(path: Path, offset: int, num_bytes: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), num_bytes, offset)
    return encode_chunk(Chunk(offset, data, crc32c(data)))
