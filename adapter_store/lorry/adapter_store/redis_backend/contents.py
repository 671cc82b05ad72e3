"""The contents of versions in Redis."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from lorry.adapter_store.lora import LoraSpec
from lorry.adapter_store.records import Content
from lorry.adapter_store.redis_backend.chunks import ChunkDamaged, ChunkReader, path_of
from lorry.adapter_store.redis_backend.link import RedisLink
from lorry.rpc.errors import DigestMismatch, VersionNotFound

LEASE_MS = 60_000  # renewed by each sweep of a store
READ_ATTEMPTS = 3


class RedisContents:
    """The contents of a backend. `grace_ms` is how long one stays that nothing refers to."""

    def __init__(self, link: RedisLink, reader: ChunkReader, *, grace_ms: int) -> None:
        self._link = link
        self._reader = reader
        self._grace_ms = grace_ms

    @contextlib.contextmanager
    def weights(self, digest: bytes) -> Iterator[tuple[Content, Path]]:
        with self._reader.scratch_file() as file:
            content = self._read_into(file, digest)
            yield content, path_of(file)

    def find(self, digest: bytes) -> tuple[Content, list[bytes]]:
        """A content and its chunks, leased; raises VersionNotFound."""
        found = self._link.run("read_content", digest.hex(), LEASE_MS)
        if found is None:
            raise VersionNotFound(f"no version {digest.hex()}", version=digest.hex())
        spec, checksum, _, chunks = found
        return Content(LoraSpec.from_json(spec.decode()), int(checksum)), chunks

    def lease(self, digests: Collection[bytes]) -> None:
        self._link.run("lease", LEASE_MS, *(digest.hex() for digest in digests))

    def unreferenced(self) -> list[bytes]:
        found = self._link.run("unreferenced", self._grace_ms)
        return [bytes.fromhex(digest.decode()) for digest in found]

    def _read_into(self, file: IO[bytes], digest: bytes) -> Content:
        for _ in range(READ_ATTEMPTS):
            content, chunks = self.find(digest)
            file.truncate(file.seek(0))
            try:
                self._reader.read_into(file, chunks)
                return content
            except ChunkDamaged:
                if self.find(digest)[1] == chunks:
                    break  # else another upload of the same version has brought other chunks
        raise DigestMismatch.of_version(digest)

    def drop(self, digest: bytes) -> None:
        self._link.run("drop_content", digest.hex())
