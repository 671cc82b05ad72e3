"""Where a store keeps what must survive it: contents by digest, names, and uploads under way."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from lorry.adapter_store.records import Adapter, Change, Content, UploadRecord


class Loaded(NamedTuple):
    """Everything that a backend held when it was opened."""

    store_id: str  # of the revisions
    base_revision: int  # the last one before `changes`
    adapters: list[Adapter]  # as of base_revision
    changes: list[Change]  # since then, in order
    digests: set[bytes]  # of all contents, also those that no name refers to
    uploads: list[tuple[UploadRecord, int]]  # with the bytes received


class Backend(Protocol):
    """Durable storage. Methods block, so they are called from threads; each is one atomic step.

    Failures are LorryErrors: StoreFull where there is no room, else StoreUnavailable.
    """

    def load(self) -> Loaded: ...

    def commit(self, change: Change) -> None:
        """Make the next revision durable: the pointer, the revision and the event in one."""

    def create_upload(self, upload: UploadRecord) -> None: ...

    def append(self, key: str, data: bytes) -> None:
        """Add to an upload's bytes."""

    def staged(self, key: str) -> AbstractContextManager[Path]:
        """An upload's bytes as a local file."""
        ...

    def keep(self, key: str, digest: bytes, content: Content) -> None:
        """Make an upload's bytes, durably, the content of `digest`, unless there is one."""

    def drop_upload(self, key: str) -> None: ...

    def weights(self, digest: bytes) -> AbstractContextManager[tuple[Content, Path]]:
        """A content and its safetensors as a local file."""
        ...

    def drop(self, digest: bytes) -> None:
        """Delete a content."""

    def close(self) -> None: ...
