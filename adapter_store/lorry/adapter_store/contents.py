"""The contents of versions: each stays as long as a name, a lease or an upload refers to it."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator

from lorry.adapter_store.backend import Backend
from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.records import Content
from lorry.rpc.errors import VersionNotFound


class Contents:
    """Knows which contents there are and who uses them."""

    def __init__(self, backend: Backend, catalogue: Catalogue, digests: set[bytes]) -> None:
        self._backend = backend
        self._catalogue = catalogue
        self._digests = digests
        self._holds: Counter[bytes] = Counter()
        self._one_at_a_time = asyncio.Lock()  # keeping and dropping

    def hold(self, digest: bytes) -> None:
        """Keep a content until `release`; raises VersionNotFound."""
        if digest not in self._digests:
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

    async def keep(self, key: str, digest: bytes, content: Content) -> None:
        """Make an upload's bytes a content; the caller holds it."""
        async with self._one_at_a_time:
            await asyncio.to_thread(self._backend.keep, key, digest, content)
            self._digests.add(digest)

    def unreferenced(self) -> list[bytes]:
        return [digest for digest in self._digests if not self._is_referenced(digest)]

    async def drop(self, digest: bytes) -> None:
        """Delete a content unless something refers to it again."""
        async with self._one_at_a_time:
            if digest in self._digests and not self._is_referenced(digest):
                self._digests.discard(digest)
                await asyncio.to_thread(self._backend.drop, digest)

    def _is_referenced(self, digest: bytes) -> bool:
        return self._holds[digest] > 0 or self._catalogue.refers_to(digest)
