"""Uploads under way in Redis: whole chunks, and a tail that is not one yet."""

import contextlib
import json
from collections.abc import Collection, Iterator
from hashlib import sha256
from pathlib import Path

from lorry.adapter_store.backend import Outdated, StoredUpload, UnderWay
from lorry.adapter_store.records import Content, UploadRecord, upload_from_json, upload_to_json
from lorry.adapter_store.redis_backend.chunks import (
    CHUNK_BYTES,
    ChunkDamaged,
    ChunkReader,
    path_of,
    write_all,
)
from lorry.adapter_store.redis_backend.link import RedisLink
from lorry.rpc.errors import DigestMismatch, OffsetMismatch, StoreFull, UploadNotFound

RECORDS_PER_READ = 500


class RedisUploads:
    """The uploads of a backend."""

    def __init__(self, link: RedisLink, reader: ChunkReader) -> None:
        self._link = link
        self._reader = reader

    def all(self) -> list[UploadRecord]:
        with self._link.client() as client:
            keys = client.zrange("lorry:active", 0, -1)
        return self._records(keys)

    def of(self, tenant: str) -> UnderWay:
        num_begun, keys = self._link.run("uploads_of", tenant)
        return UnderWay(self._records(keys), int(num_begun))

    def create(self, upload: UploadRecord, *, num_begun: int) -> None:
        self._check_room(upload.weights_bytes)
        record = json.dumps(upload_to_json(upload))
        if not self._link.run("create_upload", upload.key, upload.name.tenant, record, num_begun):
            raise Outdated("another upload of the tenant has begun")

    def find(self, key: str) -> StoredUpload | None:
        found = self._link.run("find_upload", key)
        if found is None:
            return None
        record, received, idle_ms = found
        return StoredUpload(upload_from_json(json.loads(record)), int(received), idle_ms / 1e3)

    def append(self, key: str, offset: int, data: bytes | memoryview) -> None:
        """Each part up to the end of a chunk is a step; one that is repeated does nothing."""
        start = 0
        while start < len(data):
            part = data[start : start + CHUNK_BYTES - (offset + start) % CHUNK_BYTES]
            self._append_part(key, offset + start, part)
            start += len(part)

    @contextlib.contextmanager
    def staged(self, key: str) -> Iterator[Path]:
        digests, tail = self._link.run("staged", key)
        with self._reader.scratch_file() as file:
            try:
                self._reader.read_into(file, digests)
            except ChunkDamaged as error:
                raise DigestMismatch("uploaded bytes were damaged; upload them again") from error
            write_all(file, tail)
            yield path_of(file)

    def keep(self, key: str, digest: bytes, content: Content) -> None:
        self._seal(key)
        stored = self.find(key)
        kept = stored is not None and self._link.run(
            "keep",
            key,
            digest.hex(),
            content.spec.to_json(),
            content.file_crc32c,
            stored.received_bytes,
        )
        if not kept:
            raise UploadNotFound("the upload has expired")

    def drop(self, key: str) -> None:
        self._link.run("drop_upload", key)

    def drop_expired(self, idle_s: float, *, busy: Collection[str]) -> list[str]:
        expired = self._link.run("drop_expired", int(idle_s * 1e3), *busy)
        return [key.decode() for key in expired]

    def _append_part(self, key: str, offset: int, part: bytes | memoryview) -> None:
        whole = len(part) == CHUNK_BYTES
        digest = sha256(part).hexdigest() if whole else ""
        end = offset + len(part)
        received = self._link.run("append", key, offset, part, digest, CHUNK_BYTES)
        if received == -2:
            self._seal(key)
            received = self._link.run("append", key, offset, part, digest, CHUNK_BYTES)
        if received < 0:
            raise UploadNotFound("the upload has expired")
        if received != end:
            raise OffsetMismatch.at(received, offset)
        if not whole and end % CHUNK_BYTES == 0:
            self._seal(key)

    def _seal(self, key: str) -> None:
        """Make what is there of the last chunk a chunk, if there is anything."""
        digests, tail = self._link.run("staged", key)
        if tail:
            self._link.run("seal", key, len(digests), sha256(tail).hexdigest(), len(tail))

    def _records(self, keys: list[bytes]) -> list[UploadRecord]:
        records: list[UploadRecord] = []
        for start in range(0, len(keys), RECORDS_PER_READ):
            with self._link.client() as client:
                pipeline = client.pipeline(transaction=False)
                for key in keys[start : start + RECORDS_PER_READ]:
                    pipeline.hget(b"lorry:upload:" + key, "record")
                texts = pipeline.execute()
            records += [upload_from_json(json.loads(text)) for text in texts if text]
        return records

    def _check_room(self, num_bytes: int) -> None:
        """Refuse at once what cannot fit; what fits now may still be refused later."""
        with self._link.client() as client:
            memory = client.info("memory")
        limit = memory["maxmemory"]
        if limit and memory["used_memory"] + num_bytes > limit:
            raise StoreFull("the store's Redis has no room for the weights (maxmemory)")
