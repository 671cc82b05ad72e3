"""Print what pyproject.toml requires for one extra, a requirement a line: the images install that
in a layer of its own, which stays the same while only Lorry's code changes.

    python deploy/requirements.py router
"""

import sys
import tomllib
from pathlib import Path


def requirements(extra: str, pyproject: Path = Path("pyproject.toml")) -> list[str]:
    """Raises KeyError for an extra that there is not."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
