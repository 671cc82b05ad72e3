"""What a run has done so far, on the terminal."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorry.client.bench.messages import Progress as PartProgress
from lorry.client.bench.record import Record
from lorry.client.console import make_table

RECENT = 500  # ended requests that the percentiles are of


class LiveProgress:
    """Hears of the parts' progress; `live` shows it where the console is a terminal."""

    def __init__(self, console: Console, num_requests: int) -> None:
        self.records: list[Record] = []  # of ended requests
        self._console = console
        self._sent: dict[int, int] = {}  # by part
        self._recent: deque[Record] = deque(maxlen=RECENT)
        self._output_tokens = 0
        self._met = 0
        self._failed = 0
        self._started_s = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("requests ended", total=num_requests)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        self._started_s = time.monotonic()
        with Live(console=self._console, get_renderable=self._render, refresh_per_second=4):
            yield

    def note(self, part: int, progress: PartProgress) -> None:
        self._sent[part] = progress.sent
        self.records += progress.ended
        self._recent += progress.ended
        for record in progress.ended:
            self._output_tokens += record.output_tokens
            self._met += record.met_slo
            self._failed += not record.ok
        self._bar.update(self._task, completed=len(self.records))

    def _render(self) -> RenderableType:
        ended, sent = len(self.records), sum(self._sent.values())
        table = make_table("sent", "open", "failed", "met SLO", "tokens/s", "TTFT p50", "p99")
        tokens_per_s = self._output_tokens / max(1e-3, time.monotonic() - self._started_s)
        table.add_row(
            str(sent),
            str(max(0, sent - ended)),
            str(self._failed),
            f"{self._met / ended:.1%}" if ended else "-",
            f"{tokens_per_s:,.0f}",
            *(self._ttft(percent) for percent in (50, 99)),
        )
        return Group(self._bar, table)

    def _ttft(self, percent: int) -> str:
        """Of the last requests."""
        found = [record.ttft_s for record in self._recent if record.ttft_s is not None]
        return f"{np.percentile(found, percent) * 1e3:.0f} ms" if found else "-"
