"""How README and docs word what result files hold."""

import re
from typing import Any

Result = dict[str, Any]

# Where a run's files went, and of which tree it was, says nothing of what was measured.
_INCIDENTAL = re.compile(r" --(directory|commit) \S+")


def spread(value: dict[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['min']:{form}} to {value['max']:{form}})"


def command(row: Result) -> str:
    return f"`{_INCIDENTAL.sub('', row['command'])}`"


def source(row: Result) -> str:
    return f"{command(row)}, {row['device']}, {row['date'][:10]}"
