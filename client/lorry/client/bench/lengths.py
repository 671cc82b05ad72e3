"""Distributions of the number of tokens of prompts and outputs."""

from dataclasses import dataclass

import numpy as np

MAX_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Uniform:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= MAX_TOKENS:
            raise ValueError(f"lengths must be 1 to {MAX_TOKENS} and ascend, got {self}")

    def draw(self, random: np.random.RandomState, count: int) -> np.ndarray:
        return random.randint(self.low, self.high + 1, count)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Rounded, at least 1 and at most `most`; half of them are below `median`."""

    median: float
    sigma: float  # standard deviation of the logarithm
    most: int

    def __post_init__(self) -> None:
        if not (0 < self.median <= self.most <= MAX_TOKENS and self.sigma >= 0):
            raise ValueError(
                f"a lognormal length must have 0 < MEDIAN <= MOST <= {MAX_TOKENS} "
                f"and SIGMA >= 0, got {self}"
            )

    def draw(self, random: np.random.RandomState, count: int) -> np.ndarray:
        drawn = random.lognormal(np.log(self.median), self.sigma, count)
        return np.clip(drawn.round(), 1, self.most).astype(int)

    def __str__(self) -> str:
        return f"lognormal:{self.median:g}:{self.sigma:g}:{self.most}"


Lengths = Uniform | LogNormal


def parse_lengths(text: str) -> Lengths:
    """``N``, ``LOW-HIGH`` or ``lognormal:MEDIAN:SIGMA:MOST``; raises ValueError naming the text."""
    kind, *numbers = text.split(":")
    try:
        if kind == "lognormal":
            median, sigma, most = numbers
            return LogNormal(float(median), float(sigma), int(most))
        low, dash, high = text.partition("-")
        return Uniform(int(low), int(high) if dash else int(low))
    except ValueError as error:
        raise ValueError(
            f"lengths must be N, LOW-HIGH or lognormal:MEDIAN:SIGMA:MOST, got {text!r}: {error}"
        ) from error
