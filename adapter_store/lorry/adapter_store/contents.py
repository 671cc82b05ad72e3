"""The contents of versions: each stays as long as a name, a lease or an upload refers to it."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator

from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.records import Content
from lorry.adapter_store.storage import Storage
from lorry.rpc.errors import VersionNotFound


class Contents:
    """Knows who in this store uses which contents; the backend knows those that there are."""

    def __init__(self, storage: Storage, catalogue: Catalogue) -> None:
        self._storage = storage
        self._catalogue = catalogue
        self._holds: Counter[bytes] = Counter()
        self._going: set[bytes] = set()  # being dropped
        self._one_at_a_time = asyncio.Lock()  # keeping and dropping

    def hold(self, digest: bytes) -> None:
        """Keep a content until `release`; raises VersionNotFound if it is being dropped."""
        if digest in self._going:
            raise VersionNotFound(f"no version {digest.hex()}", version=digest.hex())
        self._holds[digest] += 1

    def release(self, digest: bytes) -> None:
        self._holds[digest] -= 1
        if not self._holds[digest]:
            del self._holds[digest]

    @contextlib.contextmanager
    def held(self, digest: bytes) -> Iterator[None]:
        """Hold a content that may not be there yet."""
        self._holds[digest] += 1
        try:
            yield
        finally:
            self.release(digest)

    def is_referenced(self, digest: bytes) -> bool:
        return self._holds[digest] > 0 or self._catalogue.refers_to(digest)

    async def keep(self, key: str, digest: bytes, content: Content) -> None:
        """Make an upload's bytes a content; the caller holds it."""
        async with self._one_at_a_time:
            await self._storage.run(self._storage.backend.keep, key, digest, content)

    async def lease(self) -> None:
        """Tell other stores what this one hands out."""
        if self._holds:
            await self._storage.run(self._storage.backend.lease, list(self._holds))

    async def drop_unreferenced(self) -> None:
        """Delete the contents that nothing refers to."""
        for digest in await self._storage.run(self._storage.backend.unreferenced):
            async with self._one_at_a_time:
                if not self.is_referenced(digest):
                    await self._drop(digest)

    async def _drop(self, digest: bytes) -> None:
        self._going.add(digest)
        try:
            await self._storage.run(self._storage.backend.drop, digest)
        finally:
            self._going.discard(digest)
