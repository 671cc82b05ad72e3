"""Reading chunks from Redis: each is verified before anybody sees a byte of it."""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from lorry.adapter_store.redis_backend.link import RedisLink

CHUNK_BYTES = 1 << 20
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
        with tempfile.TemporaryFile(
            dir=self._directory, prefix="lorry-weights-", buffering=0
        ) as file:
            yield file

    def read_into(self, file: IO[bytes], digests: Sequence[bytes]) -> None:
        """Append chunks to a file. Raises ChunkDamaged, and then the chunk was put aside."""
        for start in range(0, len(digests), CHUNKS_PER_READ):
            part = [digest.decode() for digest in digests[start : start + CHUNKS_PER_READ]]
            for digest, data in zip(part, self._get(part), strict=True):
                file.write(self._checked(digest, data))

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


def path_of(file: IO[bytes]) -> Path:
    """Where other processes of the same user can open a file that has no name."""
    return Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def _is(digest: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == digest
