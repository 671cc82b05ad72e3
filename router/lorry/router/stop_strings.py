"""Where a text ends because of a stop string, found while the text arrives."""

from collections.abc import Sequence


class StopMatcher:
    """Passes on the text before the first stop string.

    The first is the one that is complete first, and of several that end together the longest. So
    the cut does not depend on how the text arrives in pieces. Text is held back only while it could
    be the start of a stop string.
    """

    __slots__ = ("_firsts", "_held", "_longest", "_prefixes", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._firsts = {stop[0] for stop in stops}
        self._prefixes = {stop[:size] for stop in stops for size in range(1, len(stop))}
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, counts: bool = True) -> str:
        """The text that can be passed on now; unless `counts`, matches that end in it are ignored.

        After a match nothing more may be pushed.
        """
        buffer = self._held + text
        if counts:
            match = self._first_match(buffer)
            if match is not None:
                end, self.matched = match
                self._held = ""
                return buffer[: end - len(self.matched)]
        size = self._held_size(buffer)
        self._held = buffer[len(buffer) - size :]
        return buffer[: len(buffer) - size]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text

    def _first_match(self, buffer: str) -> tuple[int, str] | None:
        """End and stop string of the first match that ends in the new part of `buffer`."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[0], best[2])

    def _held_size(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            if buffer[start] in self._firsts and buffer[start:] in self._prefixes:
                return len(buffer) - start
        return 0
