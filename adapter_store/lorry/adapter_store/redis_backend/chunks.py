"""Reading chunks from Redis: each is verified before anybody sees a byte of it."""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from lorry.adapter_store.durable import disk_errors
from lorry.adapter_store.redis_backend.link import RedisLink

CHUNK_BYTES = 1 << 20
PREFIX = "lorry-weights-"  # of scratch files
CHUNKS_PER_READ = 4  # so much memory a reader takes

log = logging.getLogger(__name__)


class ChunkDamaged(Exception):
    """A chunk is not there, or not what its digest says."""

    def __init__(self, digest: str) -> None:
        super().__init__(digest)
        self.digest = digest


class ChunkReader:
    """Puts chunks together in local files, which builders map."""

    def __init__(self, link: RedisLink, directory: Path | None) -> None:
        self._link = link
        self._directory = directory

    @contextlib.contextmanager
    def scratch_file(self) -> Iterator[IO[bytes]]:
        """An empty file that is gone afterwards, also if the process is killed meanwhile."""
        with contextlib.ExitStack() as stack:
            with disk_errors("the store's scratch directory"):
                file = stack.enter_context(
                    tempfile.TemporaryFile(dir=self._directory, prefix=PREFIX, buffering=0)
                )
            yield file

    def read_into(self, file: IO[bytes], digests: Sequence[bytes]) -> None:
        """Append chunks to a file.

        Raises ChunkDamaged, and then the chunk was put aside, and StoreFull for want of room.
        """
        for start in range(0, len(digests), CHUNKS_PER_READ):
            part = [digest.decode() for digest in digests[start : start + CHUNKS_PER_READ]]
            for digest, data in zip(part, self._get(part), strict=True):
                write_all(file, self._checked(digest, data))

    def check(self, digest: str) -> None:
        """Raises ChunkDamaged like `read_into`."""
        self._checked(digest, self._get([digest])[0])

    def _get(self, digests: Sequence[str]) -> list[bytes | None]:
        with self._link.client() as client:
            found: list[bytes | None] = client.mget([f"lorry:chunk:{each}" for each in digests])
        return found

    def _checked(self, digest: str, data: bytes | None) -> bytes:
        if data is not None and _is(digest, data):
            return data
        again = self._get([digest])[0]
        if again is not None and _is(digest, again):
            log.warning("chunk %s was damaged on its way from Redis", digest)
            return again
        if again is not None:
            log.error("chunk %s is damaged; it is put aside", digest)
            sha1 = hashlib.sha1(again, usedforsecurity=False).hexdigest()
            self._link.run("quarantine", digest, sha1)
        raise ChunkDamaged(digest)


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write to an unbuffered file, which takes what there is room for; raises StoreFull."""
    rest = memoryview(data)
    with disk_errors("the store's scratch directory"):
        while rest:
            rest = rest[file.write(rest) :]


def path_of(file: IO[bytes]) -> Path:
    """Where other processes of the same user can open a file that has no name."""
    return Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def _is(digest: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == digest
