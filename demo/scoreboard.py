"""Who has answered what, as it comes in, and as a table."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

BASE = "base model"
COLUMNS = ["rank", "first call", "requests", "first token", "tokens/s", "right answers"]


@dataclass(frozen=True, slots=True)
class Pushed:
    """An adapter in the store."""

    rank: int
    first_call_s: float  # to the first token of the first request ever


@dataclass(slots=True)
class Score:
    """Of one adapter, or of the base model."""

    pushed: Pushed | None  # None: the base model
    num_requests: int
    first_token_s: list[float] = field(default_factory=list)  # of each request, from its sending
    num_tokens: int = 0
    num_answered: int = 0
    num_right: int = 0
    last_token_at_s: float = 0.0

    @property
    def exact(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num_answered if self.num_answered else 0.0


class Scoreboard:
    """Its clock starts when it is made."""

    def __init__(self, pushed: Mapping[str, Pushed], adapters: Sequence[str]) -> None:
        """`adapters` are those of all requests; the empty id is the base model."""
        self.scores = {
            adapter: Score(each, adapters.count(adapter))
            for adapter, each in {**pushed, "": None}.items()
        }
        self._began_at_s = time.monotonic()

    def count_tokens(self, adapter: str, num_tokens: int) -> None:
        score = self.scores[adapter]
        score.num_tokens += num_tokens
        score.last_token_at_s = time.monotonic()

    def count_first_token(self, adapter: str) -> None:
        self.scores[adapter].first_token_s.append(time.monotonic() - self._began_at_s)

    def count_answer(self, adapter: str, *, right: bool) -> None:
        score = self.scores[adapter]
        score.num_answered += 1
        score.num_right += right

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together, from the first sending to the last token."""
        return self._rate(
            sum(score.num_tokens for score in self.scores.values()),
            max(score.last_token_at_s for score in self.scores.values()),
        )

    def table(self) -> Table:
        table = Table("adapter", box=None, header_style="bold", pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for adapter, score in self.scores.items():
            table.add_row(adapter or BASE, *self._cells(score))
        return table

    def _cells(self, score: Score) -> list[str]:
        pushed, waits_s = score.pushed, score.first_token_s
        return [
            str(pushed.rank) if pushed else "-",
            f"{pushed.first_call_s * 1e3:.0f} ms" if pushed else "-",
            f"{score.num_answered}/{score.num_requests}",
            f"{statistics.median(waits_s) * 1e3:.0f} ms" if waits_s else "",
            f"{self._rate(score.num_tokens, score.last_token_at_s):.0f}",
            f"{score.num_right}/{score.num_answered}",
        ]

    def _rate(self, num_tokens: int, until_s: float) -> float:
        return num_tokens / (until_s - self._began_at_s) if num_tokens else 0.0
