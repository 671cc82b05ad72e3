"""Distributions of what the engine does, as counts that travel with its Status."""

from dataclasses import dataclass, field

from lorry.rpc.histogram import COUNTS, SECONDS, SHORT_SECONDS, Histogram

STEP_KINDS = ("decode", "mixed")
FETCH_SOURCES = ("shm", "chunks")  # the adapter store's shared memory, or copied by gRPC
LOAD_SOURCES = (*FETCH_SOURCES, "host")  # the first load after a fetch, and further ones


def _histograms(names: tuple[str, ...], bounds: tuple[float, ...]) -> dict[str, Histogram]:
    return {name: Histogram(bounds) for name in names}


@dataclass(slots=True)
class StepStatistics:
    seconds: dict[str, Histogram] = field(
        default_factory=lambda: _histograms(STEP_KINDS, SHORT_SECONDS)
    )
    rows: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    sequences: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    adapters: Histogram = field(default_factory=lambda: Histogram(COUNTS))  # distinct ones

    def note(
        self, seconds: float, *, decodes_only: bool, rows: int, sequences: int, adapters: int
    ) -> None:
        self.seconds["decode" if decodes_only else "mixed"].observe(seconds)
        self.rows.observe(rows)
        self.sequences.observe(sequences)
        self.adapters.observe(adapters)


@dataclass(slots=True)
class Transfers:
    """Of page images, by source."""

    seconds: dict[str, Histogram] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: tuple[str, ...], bounds: tuple[float, ...]) -> "Transfers":
        return cls(_histograms(sources, bounds), dict.fromkeys(sources, 0))

    def note(self, source: str, num_bytes: int, seconds: float) -> None:
        self.seconds[source].observe(seconds)
        self.num_bytes[source] += num_bytes


def fetches() -> Transfers:
    """From the adapter store."""
    return Transfers.of(FETCH_SOURCES, SECONDS)


def loads() -> Transfers:
    """Into the pool."""
    return Transfers.of(LOAD_SOURCES, SHORT_SECONDS)
