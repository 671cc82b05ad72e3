"""What the store counts of its work."""

from collections import Counter
from dataclasses import dataclass, field

from lorry.rpc.histogram import SECONDS, Histogram


@dataclass(slots=True)
class ImageCounts:
    """Of the RAM tier."""

    wanted: Counter[tuple[str]] = field(default_factory=Counter)  # by state when asked for
    wanted_bytes: Counter[tuple[str]] = field(default_factory=Counter)  # by the same states
    evictions: int = 0
    built_ahead: int = 0
    read_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    build_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    built_bytes: int = 0
    failed_builds: int = 0


@dataclass(slots=True)
class FetchCounts:
    """Of what workers fetch, by transport: shm or chunks."""

    begun: Counter[tuple[str]] = field(default_factory=Counter)
    num_bytes: Counter[tuple[str]] = field(default_factory=Counter)
    lease_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))


@dataclass(slots=True)
class UploadCounts:
    received_bytes: int = 0
    ended: Counter[tuple[str]] = field(default_factory=Counter)  # by last state
