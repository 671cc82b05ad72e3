"""How far a router's predictions of times to first token were off, from its metrics."""

from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

from tests.support.scrape import Scrape

BUCKETS = "lorry_router_ttft_prediction_error_ratio_bucket"


@dataclass(frozen=True, slots=True)
class PredictionError:
    """|predicted - true| / true of the requests whose first token came meanwhile, as they
    arrived: the counts up to each bound."""

    counts: dict[float, float]

    @classmethod
    def between(cls, before: Scrape, after: Scrape) -> "PredictionError":
        bounds = sorted(after.label_values(BUCKETS, "le"), key=float)
        return cls(
            {
                float(le): after.value(BUCKETS, le=le, at="arrival")
                - before.value(BUCKETS, le=le, at="arrival")
                for le in bounds
            }
        )

    @property
    def requests(self) -> int:
        return int(max(self.counts.values(), default=0))

    @property
    def median(self) -> float:
        """Interpolated within its bucket."""
        half = self.requests / 2
        below = {0.0: 0.0} | self.counts
        for (low, low_count), (high, count) in pairwise(below.items()):
            if count >= half > 0:
                width = high - low if isfinite(high) else low
                return low + width * (half - low_count) / (count - low_count)
        return 0.0

    def share_within(self, error: float) -> float:
        return self.counts[error] / self.requests if self.requests else 0.0

    def metrics(self) -> dict[str, float]:
        return {
            "requests": self.requests,
            "median": round(self.median, 4),
            "within_0.2": round(self.share_within(0.2), 4),
            "within_0.5": round(self.share_within(0.5), 4),
        }
