"""Implements `Backend` on a Redis."""

import logging
import uuid
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path

from lorry.adapter_store.backend import Loaded, Position, StoredUpload, UnderWay
from lorry.adapter_store.records import Adapter, Change, Content, UploadRecord
from lorry.adapter_store.redis_backend import books
from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.catalogue import RedisCatalogue
from lorry.adapter_store.redis_backend.chunks import ChunkReader
from lorry.adapter_store.redis_backend.contents import RedisContents
from lorry.adapter_store.redis_backend.link import RedisLink
from lorry.adapter_store.redis_backend.server_check import check_server
from lorry.adapter_store.redis_backend.uploads import RedisUploads
from lorry.rpc.errors import StoreUnavailable
from lorry.rpc.names import AdapterName

FORMAT = b"1"
GRACE_MS = 30_000  # more than other stores take to say what they hand out

log = logging.getLogger(__name__)


class RedisBackend:
    """Raises ValueError if the Redis is of another base model, or cannot keep adapters.

    Weights pass through files in `scratch_dir`, by default the system's for temporary files.
    """

    shared = True

    def __init__(
        self,
        address: RedisAddress,
        *,
        model_digest: bytes | None,
        scratch_dir: Path | None = None,
        grace_ms: int = GRACE_MS,
    ) -> None:
        self.link = RedisLink(address)
        self.reader = ChunkReader(self.link, scratch_dir)
        try:
            check_server(self.link, address)
            _, self.model_digest = self._open(address, model_digest)
            self.catalogue = RedisCatalogue(
                self.link, lambda: self._open(address, self.model_digest)[0]
            )
        except StoreUnavailable as error:
            raise ValueError(f"{address} cannot be used: {error.__cause__}") from error
        self.uploads = RedisUploads(self.link, self.reader)
        self.contents = RedisContents(self.link, self.reader, grace_ms=grace_ms)

    def load(self) -> Loaded:
        position, adapters, changes = self.catalogue.load()
        return Loaded(self.catalogue.store_id, position, adapters, changes, self.uploads.all())

    def commit(self, name: AdapterName, before: Adapter | None, after: Adapter | None) -> Change:
        return self.catalogue.commit(name, before, after)

    def changes(self, after: Position) -> list[Change]:
        return self.catalogue.changes(after)

    def wait_for_changes(self, after: Position) -> list[Change]:
        return self.catalogue.wait_for_changes(after)

    def uploads_of(self, tenant: str) -> UnderWay:
        return self.uploads.of(tenant)

    def create_upload(self, upload: UploadRecord, *, num_begun: int) -> None:
        self.uploads.create(upload, num_begun=num_begun)

    def find_upload(self, key: str) -> StoredUpload | None:
        return self.uploads.find(key)

    def append(self, key: str, offset: int, data: bytes | memoryview) -> None:
        self.uploads.append(key, offset, data)

    def staged(self, key: str) -> AbstractContextManager[Path]:
        return self.uploads.staged(key)

    def keep(self, key: str, digest: bytes, content: Content) -> None:
        self.uploads.keep(key, digest, content)

    def drop_upload(self, key: str) -> None:
        self.uploads.drop(key)

    def drop_expired(self, idle_s: float, *, busy: Collection[str]) -> list[str]:
        return self.uploads.drop_expired(idle_s, busy=busy)

    def weights(self, digest: bytes) -> AbstractContextManager[tuple[Content, Path]]:
        return self.contents.weights(digest)

    def lease(self, digests: Collection[bytes]) -> None:
        self.contents.lease(digests)

    def unreferenced(self) -> list[bytes]:
        return self.contents.unreferenced()

    def drop(self, digest: bytes) -> None:
        self.contents.drop(digest)

    def quarantine(self, digest: bytes) -> None:
        """Nothing to do: chunks are verified, and put aside, as they are read."""

    def problems(self) -> list[str]:
        return books.problems(self.link)

    def close(self) -> None:
        self.link.close()

    def _open(self, address: RedisAddress, model_digest: bytes | None) -> tuple[str, bytes]:
        """The store id and the digest of the base model."""
        wanted = "" if model_digest is None else model_digest.hex()
        found, store_id, form = self.link.run("open", wanted, uuid.uuid4().hex, FORMAT)
        if found is None:
            raise ValueError(f"{address} is not the Redis of a store")
        if form != FORMAT:
            raise ValueError(f"{address} has format {form.decode()}, not {FORMAT.decode()}")
        if wanted not in ("", found.decode()):
            raise ValueError(f"{address} holds adapters of another base model")
        return store_id.decode(), bytes.fromhex(found.decode())
