"""Uploads: bytes that arrive in pieces, over several streams if need be, and end as a version."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from hashlib import sha256

from crc32c import crc32c

from lorry.adapter_store.backend import Outdated
from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.counts import UploadCounts
from lorry.adapter_store.limits import Limits
from lorry.adapter_store.pace import Pace
from lorry.adapter_store.publisher import Publisher
from lorry.adapter_store.records import Published, UploadRecord
from lorry.adapter_store.storage import Storage
from lorry.adapter_store.tasks import Tasks
from lorry.adapter_store.upload import Upload, UploadState
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
from lorry.rpc.names import AdapterName
from lorry.rpc.protocol import MAX_CHUNK_BYTES
from lorry.rpc.weight_chunk import Chunk

ID_BYTES = 32
CHUNK_WAIT_S = 60
RESULT_KEPT_S = 60.0


class Uploads:
    """Owns the uploads that came here; the backend knows those of all stores that share it."""

    def __init__(
        self,
        *,
        storage: Storage,
        publisher: Publisher,
        catalogue: Catalogue,
        limits: Limits,
        pace: Pace,
        stored: list[UploadRecord],
        now_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = UploadCounts()
        self._storage, self._backend = storage, storage.backend
        self._publisher, self._catalogue, self._limits = publisher, catalogue, limits
        self._pace = pace
        self._now_ns, self._clock = now_ns, clock
        self._uploads: dict[str, Upload] = {}
        # That have ended, with their bytes still there: so are those whose store died in between.
        self._leftovers = {r.key for r in stored if catalogue.published(r.key) is not None}
        self._tasks = Tasks()

    def check_room(self, name: AdapterName, weights_bytes: int) -> None:
        """Refuse what `create` would refuse, by what this store alone knows."""
        self._check_limits(name, weights_bytes, [])

    async def create(self, record: UploadRecord) -> tuple[str, Upload]:
        """Begin an upload; returns its id, which is kept nowhere, and the upload."""
        upload_id = secrets.token_urlsafe(ID_BYTES)
        record = replace(record, key=_key(upload_id))
        return upload_id, await self._tasks.finish(self._create(record))

    async def published(self, upload_id: str, tenant: str) -> Published | None:
        """What an upload of this tenant has become: known as long as its version is.

        So a client that lost the answer learns it in any later life of the store, and of any store.
        """
        published = await self._catalogue.find_published(_key(upload_id))
        ours = published is not None and published.adapter.name.tenant == tenant
        return published if ours else None

    async def find(self, upload_id: str, tenant: str) -> Upload | Published:
        """An upload of this tenant, or what it has become; raises UploadNotFound."""
        published = await self.published(upload_id, tenant)
        if published is not None:
            return published
        try:
            return await self.get(upload_id, tenant)
        except UploadNotFound:  # unless another store has just published it
            published = await self.published(upload_id, tenant)
            if published is None:
                raise
            return published

    async def get(self, upload_id: str, tenant: str) -> Upload:
        """An upload of this tenant that is not published; raises UploadNotFound."""
        key = _key(upload_id)
        upload = self._uploads.get(key) or await self._found(key)
        if upload is not None and upload.state is UploadState.RECEIVING:
            async with upload.lock:
                await self._refresh(upload)
        if upload is None or key not in self._uploads or upload.record.name.tenant != tenant:
            raise UploadNotFound("no such upload, or it has expired")
        return upload

    def expire_time_ns(self, upload: Upload) -> int:
        """When it is forgotten unless somebody moves it on, in Unix time."""
        left_s = upload.active_s + self._limits.upload_expiry_s - self._clock()
        return self._now_ns() + int(left_s * 1e9)

    async def receive(
        self, upload_id: str, tenant: str, offset: int, chunks: AsyncIterator[Chunk]
    ) -> Published:
        """Append chunks from `offset`; after the last byte publish. An older stream is superseded.

        Broken off, by either side, the upload keeps what it has.
        """
        upload = await self.find(upload_id, tenant)
        if isinstance(upload, Published):
            return upload
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
            async with self._pace.turn(tenant):
                await self._tasks.finish(self._append(upload, writer, chunk))
        return await self._finish(upload)

    async def abandon(self, upload_id: str, tenant: str) -> None:
        """Forget an upload that nobody will continue, unless it is ending or has ended."""
        upload = self._uploads.get(_key(upload_id))
        if upload is None or upload.record.name.tenant != tenant:
            return
        async with upload.lock:
            if upload.state is UploadState.RECEIVING:
                self._forget(upload.record.key)
                await self._storage.run(self._backend.drop_upload, upload.record.key)

    @property
    def num_open(self) -> int:
        return sum(upload.is_open for upload in self._uploads.values())

    async def drop_expired(self) -> None:
        """Forget uploads that nobody has moved on for too long, and results after a minute."""
        await self._drop_leftovers()
        finishing = UploadState.FINISHING
        busy = {key for key, upload in self._uploads.items() if upload.state is finishing}
        expiry_s = self._limits.upload_expiry_s
        for key in await self._storage.run(self._backend.drop_expired, expiry_s, busy=busy):
            self.counts.ended["expired",] += 1
            self._forget(key)
        for key, upload in list(self._uploads.items()):
            kept_s = expiry_s if upload.is_open else RESULT_KEPT_S
            if upload.state is not finishing and self._clock() - upload.active_s > kept_s:
                self._forget(key)  # it has ended, or went on elsewhere

    async def close(self) -> None:
        await self._tasks.close()

    async def _create(self, record: UploadRecord) -> Upload:
        """Begin it unless a limit says no, and count it from now on."""
        tenant = record.name.tenant
        self._limits.check_rank(tenant, record.spec.max_rank)
        while True:
            under_way = await self._storage.run(self._backend.uploads_of, tenant)
            self._check_limits(record.name, record.weights_bytes, under_way.records)
            upload = self._uploads[record.key] = Upload(record, self._clock())
            try:
                await self._storage.run(
                    self._backend.create_upload, record, num_begun=under_way.num_begun
                )
            except Outdated:
                self._forget(record.key)
            except BaseException:
                self._forget(record.key)
                self._leftovers.add(record.key)  # it may have begun, and only the answer was lost
                raise
            else:
                return upload

    async def _found(self, key: str) -> Upload | None:
        """An upload that began elsewhere, or in an earlier life of this store."""
        stored = await self._storage.run(self._backend.find_upload, key)
        if stored is None:
            return None
        return self._uploads.setdefault(key, Upload(stored.record, self._clock()))

    async def _refresh(self, upload: Upload) -> None:
        """Learn how far an upload has come, which other stores may have moved on."""
        stored = await self._storage.run(self._backend.find_upload, upload.record.key)
        if stored is None:
            self._forget(upload.record.key)
        else:
            upload.received_bytes = stored.received_bytes
            upload.active_s = self._clock() - stored.idle_s

    def _forget(self, key: str) -> None:
        upload = self._uploads.pop(key, None)
        if upload is not None:
            upload.writer = None

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
            await self._storage.run(self._write, upload.record.key, chunk)
            upload.received_bytes += len(chunk.data)
            upload.active_s = self._clock()
            self.counts.received_bytes += len(chunk.data)

    def _write(self, key: str, chunk: Chunk) -> None:
        if crc32c(chunk.data) != chunk.crc32c:
            raise DigestMismatch(f"the chunk at byte {chunk.offset} does not match its crc32c")
        self._backend.append(key, chunk.offset, chunk.data)

    async def _finish(self, upload: Upload) -> Published:
        """Validate and publish once, whoever asks and stays."""
        if upload.finishing is None:
            upload.move_to(UploadState.FINISHING)
            upload.finishing = self._tasks.start(self._publish(upload))
        return await asyncio.shield(upload.finishing)

    async def _publish(self, upload: Upload) -> Published:
        try:
            published = await self._publisher.publish(upload.record)
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
        upload.active_s = self._clock()
        self._leftovers.add(upload.record.key)
        with contextlib.suppress(StoreUnavailable):  # else the next sweep drops them
            await self._drop_leftovers()

    async def _drop_leftovers(self) -> None:
        for key in list(self._leftovers):
            await self._storage.run(self._backend.drop_upload, key)
            self._leftovers.discard(key)

    def _check_limits(
        self, name: AdapterName, weights_bytes: int, stored: list[UploadRecord]
    ) -> None:
        self._limits.check(name, weights_bytes, self._open_records(stored), self._catalogue)

    def _open_records(self, stored: list[UploadRecord]) -> list[UploadRecord]:
        """Those that the backend has and those that are about to be there."""
        records = {record.key: record for record in stored}
        records |= {key: upload.record for key, upload in self._uploads.items()}
        ended = {key for key, upload in self._uploads.items() if not upload.is_open}
        published = self._catalogue.published
        return [r for r in records.values() if r.key not in ended and published(r.key) is None]


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
        raise OffsetMismatch.at(upload.received_bytes, offset)
