"""Which adapters have which labels, so that a list by label looks at no others."""

from collections.abc import Iterable, Mapping

from lorry.adapter_store.records import Adapter
from lorry.rpc.names import AdapterName

Label = tuple[str, str]


class LabelIndex:
    """Of each tenant, and of all: what one tenant's lists cost does not depend on another's."""

    def __init__(self) -> None:
        self._names: dict[tuple[str | None, Label], set[AdapterName]] = {}

    def add(self, adapter: Adapter) -> None:
        for place in _places(adapter.name, adapter.labels):
            self._names.setdefault(place, set()).add(adapter.name)

    def remove(self, adapter: Adapter) -> None:
        for place in _places(adapter.name, adapter.labels):
            names = self._names[place]
            names.discard(adapter.name)
            if not names:
                del self._names[place]

    def find(self, labels: Iterable[Label], tenant: str | None) -> set[AdapterName]:
        """Those with all of the labels, of which there is at least one; tenant None: of all."""
        sets = [self._names.get((tenant, label), set()) for label in labels]
        smallest = min(sets, key=len)
        return smallest.intersection(*sets)


def _places(name: AdapterName, labels: Mapping[str, str]) -> Iterable[tuple[str | None, Label]]:
    for label in labels.items():
        yield name.tenant, label
        yield None, label
