"""Which groups of modules the adapters of a step change; a step's graph launches no others."""

import enum
from collections.abc import Iterable

from lorry.kernels.page_layout import GROUPS

ATTENTION_MODULES = frozenset((*GROUPS[0], *GROUPS[1]))


class LoraGroups(enum.Enum):
    """The sets of groups for which there are graphs; the value indexes GROUPS."""

    NONE = ()
    ATTENTION = (0, 1)
    ALL = (0, 1, 2, 3)

    @classmethod
    def of(cls, modules: Iterable[str]) -> "LoraGroups":
        """The smallest set that holds all `modules`."""
        modules = set(modules)
        if not modules:
            return cls.NONE
        return cls.ATTENTION if modules <= ATTENTION_MODULES else cls.ALL
