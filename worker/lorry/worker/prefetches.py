"""What no request of this engine needs yet."""

from collections.abc import Iterator

RETRY_S = 10.0  # the front has tried for long, or it makes no sense to


class Prefetches:
    """The versions wanted next; one that could not be fetched is left alone for a while."""

    def __init__(self) -> None:
        self._versions: list[bytes] = []
        self._retry_s: dict[bytes, float] = {}  # when those that failed are due again

    def replace(self, versions: list[bytes]) -> None:
        """Want `versions`, most urgent first, and no others."""
        self._versions = versions
        self._retry_s = {v: self._retry_s[v] for v in versions if v in self._retry_s}

    def fail(self, version: bytes, now_s: float) -> None:
        """Skip `version` for `RETRY_S`, or until it was not wanted for a time."""
        if version in self._versions:
            self._retry_s[version] = now_s + RETRY_S

    def due(self, now_s: float) -> Iterator[bytes]:
        return (v for v in self._versions if self._retry_s.get(v, now_s) <= now_s)
