"""The router's copy of the store's catalogue: which version a name stands for."""

from collections.abc import Iterable
from typing import NamedTuple

from lorry.rpc.names import AdapterName


class AdapterVersion(NamedTuple):
    """What requests to a name get now."""

    version: bytes
    rank: int
    num_bytes: int  # of its tensors


class Change(NamedTuple):
    """One event of the catalogue; no `published` means that the name is gone."""

    name: AdapterName
    published: AdapterVersion | None


class Catalogue:
    """All tenants' adapters up to `revision` of the store `store_id`.

    A snapshot is collected aside and takes effect when it is complete, so that a name never
    disappears while it is read.
    """

    def __init__(self) -> None:
        self._adapters: dict[AdapterName, AdapterVersion] = {}
        self._snapshot: dict[AdapterName, AdapterVersion] | None = None
        self.store_id = ""
        self.revision = 0  # resume from here; 0: nothing is known, or all must be sent again

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, name: AdapterName) -> AdapterVersion | None:
        return self._adapters.get(name)

    def begin(self) -> int:
        """A new watch starts: returns the revision that it must continue from."""
        self._snapshot = None if self.revision else {}
        return self.revision

    def forget_revision(self) -> None:
        """The store cannot continue from `revision`: the next watch reads everything."""
        self.revision = 0

    def apply(
        self, changes: Iterable[Change], *, store_id: str, revision: int, complete: bool
    ) -> None:
        """Take in one message; `complete` is false within a snapshot."""
        adapters = self._adapters if self._snapshot is None else self._snapshot
        for name, published in changes:
            if published is None:
                adapters.pop(name, None)
            else:
                adapters[name] = published
        if complete:
            self._adapters, self._snapshot = adapters, None
            self.store_id, self.revision = store_id, revision
