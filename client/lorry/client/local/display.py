"""The state of the services on the terminal: a live table, or a line per change in a pipe."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from lorry.client.console import make_table
from lorry.client.local.process import ServiceProcess, State

LOG_LINES = 4  # of each service
STYLES = {State.READY: "green", State.EXITED: "red", State.STOPPING: "yellow"}


class Display:
    """Shows the services that it was told of by `on_change`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._since_s: dict[ServiceProcess, float] = {}
        self.headline = "starting"

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, get_renderable=self._render, refresh_per_second=4):
            yield

    def on_change(self, service: ServiceProcess) -> None:
        self._since_s[service] = time.monotonic()
        if not self._console.is_terminal:
            print(f"{service.name}: {service.state.value} {service.address}".rstrip(), flush=True)

    def announce(self, headline: str) -> None:
        self.headline = headline
        if not self._console.is_terminal:
            print(headline, flush=True)

    def _render(self) -> RenderableType:
        table = make_table("service", "state", "for", "address", "log")
        now_s = time.monotonic()
        for service, since_s in self._since_s.items():
            state = Text(service.state.value, style=STYLES.get(service.state, ""))
            table.add_row(
                service.name, state, f"{now_s - since_s:.0f} s", service.address, str(service.log)
            )
        return Group(Text(self.headline, style="bold"), table, *self._log_lines())

    def _log_lines(self) -> Iterator[RenderableType]:
        for service in self._since_s:
            lines = service.tail(LOG_LINES)
            if lines:
                yield Text(f"\n{service.name}", style="bold")
                yield Text("\n".join(lines), style="dim", overflow="ellipsis", no_wrap=True)
