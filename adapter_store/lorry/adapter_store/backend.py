"""Where a store keeps what must survive it: contents by digest, names, and uploads under way."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from lorry.adapter_store.records import Adapter, Change, Content, UploadRecord
from lorry.rpc.names import AdapterName


class Outdated(Exception):
    """What the caller goes by was changed meanwhile by another store: look again."""


class Position(NamedTuple):
    """How far a history of changes is known."""

    revision: int
    commit: str = ""  # of that revision's change, which tells this history from another


class Loaded(NamedTuple):
    """The names as a backend held them when it was asked."""

    store_id: str  # of the revisions
    position: Position
    adapters: list[Adapter]
    changes: Sequence[Change]  # the last ones up to the position
    uploads: list[UploadRecord]


class StoredUpload(NamedTuple):
    record: UploadRecord
    received_bytes: int
    idle_s: float  # since it was last moved on


class UnderWay(NamedTuple):
    """A tenant's uploads that have begun and neither ended nor expired."""

    records: list[UploadRecord]
    num_begun: int  # ever


class Backend(Protocol):
    """Durable storage. Methods block, so they are called from threads; each is one atomic step.

    Failures are LorryErrors: StoreFull where there is no room, DigestMismatch where what is stored
    is damaged, else StoreUnavailable.
    """

    shared: bool  # whether other stores may write to it meanwhile
    model_digest: bytes  # of the base model that its adapters are for

    def load(self) -> Loaded: ...

    def commit(self, name: AdapterName, before: Adapter | None, after: Adapter | None) -> Change:
        """Make the next revision durable: the pointer, the revision and the event in one.

        Raises Outdated unless the name is still `before`.
        """
        ...

    def changes(self, after: Position) -> list[Change]:
        """The next changes; none at the end. Raises RevisionCompacted if only `load` can tell."""
        ...

    def wait_for_changes(self, after: Position) -> list[Change]:
        """The same, but rather wait a moment than return none."""
        ...

    def uploads_of(self, tenant: str) -> UnderWay: ...

    def create_upload(self, upload: UploadRecord, *, num_begun: int) -> None:
        """Raises Outdated if its tenant has begun others than the `num_begun` meanwhile."""

    def find_upload(self, key: str) -> StoredUpload | None: ...

    def append(self, key: str, offset: int, data: bytes | memoryview) -> None:
        """Add to an upload's bytes. Raises OffsetMismatch where they do not end at `offset`."""

    def staged(self, key: str) -> AbstractContextManager[Path]:
        """An upload's bytes as a local file."""
        ...

    def keep(self, key: str, digest: bytes, content: Content) -> None:
        """Make an upload's bytes, durably, the content of `digest`, unless there is one.

        The content is kept at least until `drop_upload`.
        """

    def drop_upload(self, key: str) -> None: ...

    def drop_expired(self, idle_s: float, *, busy: Collection[str]) -> list[str]:
        """Drop uploads that nobody has moved on for so long, but none that is `busy` here."""
        ...

    def weights(self, digest: bytes) -> AbstractContextManager[tuple[Content, Path]]:
        """A content and its safetensors as a local file; raises VersionNotFound."""
        ...

    def lease(self, digests: Collection[bytes]) -> None:
        """Have contents stay for a minute; they are handed out."""

    def unreferenced(self) -> list[bytes]:
        """Contents that neither names nor uploads refer to, or only for a moment still."""
        ...

    def drop(self, digest: bytes) -> None:
        """Delete a content unless something refers to it again."""

    def quarantine(self, digest: bytes) -> None:
        """Put a content aside that is not what was uploaded, so that another may take its place."""

    def problems(self) -> list[str]:
        """What does not fit together beside the contents, each as a line."""
        ...

    def close(self) -> None: ...
