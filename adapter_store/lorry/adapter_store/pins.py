"""The names that an operator has pinned: the images of what they publish are not evicted."""

from collections.abc import Iterable, Iterator

from lorry.adapter_store.catalogue import Catalogue
from lorry.rpc.errors import StoreFull
from lorry.rpc.names import AdapterName

MAX_PINS = 256


class Pins:
    """A bounded set of names, in order; those that do not exist now pin nothing."""

    def __init__(self, names: Iterable[AdapterName], catalogue: Catalogue) -> None:
        self._names = set(names)
        self._catalogue = catalogue

    def __iter__(self) -> Iterator[AdapterName]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: AdapterName) -> None:
        """Idempotent; raises StoreFull if there are too many."""
        if name not in self._names and len(self._names) >= MAX_PINS:
            raise StoreFull(f"{MAX_PINS} adapters are pinned, which is the limit")
        self._names.add(name)

    def discard(self, name: AdapterName) -> None:
        self._names.discard(name)

    def version(self, name: AdapterName) -> bytes | None:
        """What a pinned name publishes."""
        adapter = self._catalogue.get(name)
        return None if adapter is None else adapter.published

    def versions(self) -> frozenset[bytes]:
        """Of all pinned names."""
        found = (self.version(name) for name in self._names)
        return frozenset(version for version in found if version is not None)
