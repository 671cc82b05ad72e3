"""What a terminal shows while adapters are pushed: a bar for all, and one for each under way."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lorry.client import upload
from lorry.client.console import complain, explain, make_console
from lorry.client.push import Outcome, Push
from lorry.client.weights import WEIGHTS_NAME


class PushBars:
    """Prints a line for each push that has ended; the bars need a terminal."""

    def __init__(self, pushes: Sequence[Push]) -> None:
        console = make_console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._bytes = {push: _weights_bytes(push.path) for push in pushes}
        self._tasks: dict[Push, TaskID] = {}
        self._ended: list[Push] = []
        self._all = self._bars.add_task(
            "", total=sum(self._bytes.values()), visible=len(pushes) > 1
        )
        self._show_all()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def begin(self, push: Push) -> upload.Progress:
        task = self._tasks[push] = self._bars.add_task(f"pushing {push.adapter_id}", total=None)
        return lambda sent, total: self._bars.update(task, completed=sent, total=total)

    def end(self, outcome: Outcome) -> None:
        """Say on stdout what is published, or on stderr, where others go on, what is not."""
        self._bars.remove_task(self._tasks.pop(outcome.push))
        self._ended.append(outcome.push)
        self._show_all()
        if outcome.adapter is not None:
            note = " (unchanged)" if outcome.unchanged else ""
            adapter = outcome.adapter
            print(f"{adapter.name} version {adapter.version[:12]} rank {adapter.max_rank}{note}")
        elif outcome.error is not None and len(self._bytes) > 1:
            complain(f"{outcome.push.path}: {explain(outcome.error)}")

    def _show_all(self) -> None:
        self._bars.update(
            self._all,
            description=f"{len(self._ended)} of {len(self._bytes)} adapters",
            completed=sum(self._bytes[push] for push in self._ended),
        )


def _weights_bytes(path: Path) -> int:
    weights = path if path.is_file() else path / WEIGHTS_NAME
    return weights.stat().st_size if weights.is_file() else 0
