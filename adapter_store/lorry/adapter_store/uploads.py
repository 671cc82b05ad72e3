"""Uploads: bytes that arrive in pieces, over several streams if need be, and end as a version.

RECEIVING ──> FINISHING ──> PUBLISHED
    ^             ├───────> FAILED
    └─────────────┘ (the store failed, not the upload: it may be tried again)
"""

import asyncio
import enum
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

from crc32c import crc32c

from lorry.adapter_store.backend import Backend
from lorry.adapter_store.builders import Builders
from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.chunks import Chunk
from lorry.adapter_store.contents import Contents
from lorry.adapter_store.counts import UploadCounts
from lorry.adapter_store.edits import publish
from lorry.adapter_store.limits import Limits
from lorry.adapter_store.records import Content, Published, UploadRecord, Version
from lorry.adapter_store.tasks import InThread, Tasks
from lorry.kernels.page_layout import Dtype
from lorry.rpc.errors import (
    DeadlineExpired,
    DigestMismatch,
    InvalidRequest,
    OffsetMismatch,
    StoreFull,
    StoreUnavailable,
    Superseded,
    UploadNotFound,
)
from lorry.rpc.protocol import MAX_CHUNK_BYTES

ID_BYTES = 32
CHUNK_WAIT_S = 60
FAILURE_KEPT_NS = 60 * 1_000_000_000


class UploadState(enum.Enum):
    RECEIVING = "receiving"
    FINISHING = "finishing"
    PUBLISHED = "published"
    FAILED = "failed"


TRANSITIONS: Mapping[UploadState, frozenset[UploadState]] = {
    UploadState.RECEIVING: frozenset({UploadState.FINISHING}),
    UploadState.FINISHING: frozenset(
        {UploadState.PUBLISHED, UploadState.FAILED, UploadState.RECEIVING}
    ),
    UploadState.PUBLISHED: frozenset(),
    UploadState.FAILED: frozenset(),
}


@dataclass(eq=False, slots=True)
class Upload:
    record: UploadRecord
    expire_time_ns: int
    received_bytes: int = 0
    state: UploadState = UploadState.RECEIVING
    finishing: "asyncio.Task[Published] | None" = None
    writer: object = None  # the stream that may append
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_open(self) -> bool:
        return self.state in (UploadState.RECEIVING, UploadState.FINISHING)

    @property
    def missing_bytes(self) -> int:
        return self.record.weights_bytes - self.received_bytes

    def move_to(self, state: UploadState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.record.name}: {self.state} to {state}"
        self.state = state


class Uploads:
    """Owns the uploads of all tenants."""

    def __init__(
        self,
        *,
        backend: Backend,
        builders: Builders,
        catalogue: Catalogue,
        contents: Contents,
        limits: Limits,
        dtype: Dtype,
        stored: list[tuple[UploadRecord, int]],
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.counts = UploadCounts()
        self._backend, self._builders = backend, builders
        self._catalogue, self._contents = catalogue, contents
        self._limits, self._dtype, self._now_ns = limits, dtype, now_ns
        self._uploads = {
            record.key: Upload(record, self._expiry_ns(), received_bytes=received)
            for record, received in stored
        }
        for upload in self._uploads.values():
            if catalogue.published(upload.record.key) is not None:
                upload.state, upload.expire_time_ns = UploadState.PUBLISHED, now_ns()
        self._tasks = Tasks()

    async def create(self, record: UploadRecord) -> tuple[str, Upload]:
        """Begin an upload; returns its id, which is kept nowhere, and the upload."""
        self._limits.check(record, self._open_records(), self._catalogue)
        upload_id = secrets.token_urlsafe(ID_BYTES)
        upload = Upload(replace(record, key=_key(upload_id)), self._expiry_ns())
        self._uploads[upload.record.key] = upload
        await self._tasks.finish(self._create(upload))
        return upload_id, upload

    def published(self, upload_id: str, tenant: str) -> Published | None:
        """What an upload of this tenant has become: known as long as its version is.

        So a client that lost the answer learns it in any later life of the store.
        """
        published = self._catalogue.published(_key(upload_id))
        ours = published is not None and published.adapter.name.tenant == tenant
        return published if ours else None

    def get(self, upload_id: str, tenant: str) -> Upload:
        """An upload of this tenant that is not published; raises UploadNotFound."""
        upload = self._uploads.get(_key(upload_id))
        if upload is None or upload.record.name.tenant != tenant:
            raise UploadNotFound("no such upload, or it has expired")
        return upload

    async def receive(
        self, upload_id: str, tenant: str, offset: int, chunks: AsyncIterator[Chunk]
    ) -> Published:
        """Append chunks from `offset`; after the last byte publish. An older stream is superseded.

        Broken off, by either side, the upload keeps what it has.
        """
        published = self.published(upload_id, tenant)
        if published is not None:
            return published
        upload = self.get(upload_id, tenant)
        writer = upload.writer = object()
        async with upload.lock:
            _check_offset(upload, offset)
        while upload.missing_bytes:
            chunk = await _next(chunks)
            if chunk is None:
                raise OffsetMismatch(
                    f"the stream ended at byte {upload.received_bytes} of "
                    f"{upload.record.weights_bytes}",
                    receivedBytes=upload.received_bytes,
                )
            await self._tasks.finish(self._append(upload, writer, chunk))
        return await self._finish(upload)

    @property
    def num_open(self) -> int:
        return sum(upload.is_open for upload in self._uploads.values())

    async def drop_expired(self) -> None:
        """Forget uploads that nobody has moved on for too long."""
        for upload in list(self._uploads.values()):
            expired = self._now_ns() >= upload.expire_time_ns
            if expired and upload.state is not UploadState.FINISHING:
                async with upload.lock:
                    self.counts.ended["expired",] += upload.is_open
                    upload.writer = None
                    del self._uploads[upload.record.key]
                    await asyncio.to_thread(self._backend.drop_upload, upload.record.key)

    async def close(self) -> None:
        await self._tasks.close()

    async def _create(self, upload: Upload) -> None:
        try:
            await asyncio.to_thread(self._backend.create_upload, upload.record)
        except BaseException:
            del self._uploads[upload.record.key]
            raise

    async def _append(self, upload: Upload, writer: object, chunk: Chunk) -> None:
        async with upload.lock:
            if upload.writer is None:
                raise UploadNotFound("the upload has expired")
            if upload.writer is not writer:
                raise Superseded("another stream continues this upload")
            _check_offset(upload, chunk.offset)
            if not 0 < len(chunk.data) <= min(MAX_CHUNK_BYTES, upload.missing_bytes):
                raise InvalidRequest.of(
                    "chunk.data",
                    f"must have 1 to {min(MAX_CHUNK_BYTES, upload.missing_bytes)} bytes, "
                    f"got {len(chunk.data)}",
                )
            await asyncio.to_thread(self._write, upload.record.key, chunk)
            upload.received_bytes += len(chunk.data)
            self.counts.received_bytes += len(chunk.data)
            upload.expire_time_ns = self._expiry_ns()

    def _write(self, key: str, chunk: Chunk) -> None:
        if crc32c(chunk.data) != chunk.crc32c:
            raise DigestMismatch(f"the chunk at byte {chunk.offset} does not match its crc32c")
        self._backend.append(key, chunk.data)

    async def _finish(self, upload: Upload) -> Published:
        """Validate and publish once, whoever asks and stays."""
        if upload.finishing is None:
            upload.move_to(UploadState.FINISHING)
            upload.finishing = self._tasks.start(self._publish(upload))
        return await asyncio.shield(upload.finishing)

    async def _publish(self, upload: Upload) -> Published:
        try:
            published = await self._validate_and_publish(upload.record)
        except (StoreFull, StoreUnavailable):
            upload.move_to(UploadState.RECEIVING)
            upload.finishing = None
            raise
        except BaseException:
            await self._end(upload, UploadState.FAILED)
            raise
        await self._end(upload, UploadState.PUBLISHED)
        return published

    async def _end(self, upload: Upload, state: UploadState) -> None:
        """Drop the bytes; a failure stays for a client that lost its stream."""
        upload.move_to(state)
        self.counts.ended[state.value,] += 1
        upload.expire_time_ns = self._now_ns() + FAILURE_KEPT_NS
        await asyncio.to_thread(self._backend.drop_upload, upload.record.key)

    async def _validate_and_publish(self, record: UploadRecord) -> Published:
        async with InThread(self._backend.staged(record.key)) as weights:
            checked = await self._builders.check_weights(
                weights,
                num_bytes=record.weights_bytes,
                sha256=record.weights_sha256,
                spec=record.spec,
                dtype=self._dtype,
            )
        now_ns = self._now_ns()
        version = Version(
            digest=checked.digest,
            max_rank=record.spec.max_rank,
            modules=tuple(record.spec.modules),
            weights_bytes=checked.weights_bytes,
            file_bytes=record.weights_bytes,
            upload=record.key,
            create_time_ns=now_ns,
            weights_sha256=record.weights_sha256,
            config_sha256=record.config_sha256,
        )
        kept = self._limits.versions_kept
        with self._contents.held(version.digest):
            content = Content(record.spec, checked.file_crc32c)
            await self._contents.keep(record.key, version.digest, content)
            change = await self._catalogue.change(
                record.name,
                lambda before: publish(before, record, version, now_ns=now_ns, kept=kept),
            )
        assert change.adapter is not None
        return Published(version, change.adapter)

    def _open_records(self) -> list[UploadRecord]:
        return [upload.record for upload in self._uploads.values() if upload.is_open]

    def _expiry_ns(self) -> int:
        return self._now_ns() + self._limits.upload_expiry_s * 1_000_000_000


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk | None:
    try:
        async with asyncio.timeout(CHUNK_WAIT_S):
            return await anext(chunks, None)
    except TimeoutError:
        raise DeadlineExpired(f"no chunk came for {CHUNK_WAIT_S} s; continue later") from None


def _key(upload_id: str) -> str:
    return sha256(upload_id.encode()).hexdigest()


def _check_offset(upload: Upload, offset: int) -> None:
    if offset != upload.received_bytes:
        raise OffsetMismatch(
            f"offset must be {upload.received_bytes}, got {offset}",
            receivedBytes=upload.received_bytes,
        )
