"""How often each page image has been wanted of late: what a new store should begin with."""

import heapq
import time
from collections.abc import Callable, Mapping

from lorry.adapter_store.image_key import ImageKey

HALF_LIFE_S = 3600.0
KEPT = 4096


class Popularity:
    """A count for each image, halved every `HALF_LIFE_S`; the `kept` largest are kept.

    Instead of all counts shrinking, what is added grows: a count is worth `counts / weight`.
    """

    def __init__(
        self,
        counts: Mapping[ImageKey, float],
        *,
        kept: int = KEPT,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counts = dict(counts)
        self._kept, self._now_s = kept, now_s
        self._since_s = now_s()

    def record(self, key: ImageKey) -> None:
        self._counts[key] = self._counts.get(key, 0.0) + self._weight()
        if len(self._counts) > 2 * self._kept:
            self._counts = self.snapshot()

    def snapshot(self) -> dict[ImageKey, float]:
        """What each image's count is worth now, the most wanted first."""
        weight = self._weight()
        self._since_s = self._now_s()
        self._counts = {key: count / weight for key, count in self._counts.items()}
        largest = heapq.nlargest(self._kept, self._counts.items(), key=lambda item: item[1])
        return dict(largest)

    def _weight(self) -> float:
        return float(2.0 ** ((self._now_s() - self._since_s) / HALF_LIFE_S))
