"""How the `lorry` command talks: tables and progress on stdout, one clear line when it fails."""

import sys

import grpc
from rich.console import Console
from rich.table import Table

from lorry.client.local.process import ServiceFailed
from lorry.rpc.errors import LorryError, PermissionDenied, RemoteError

PIPED_WIDTH = 200  # columns; a pipe has none of its own, and names must not be cut

NEXT_STEPS = {
    "ADAPTER_NOT_FOUND": "`lorry adapters list` shows those there are",
    "ADAPTER_EXISTS": "--replace publishes a new version under this name",
    "ETAG_MISMATCH": "someone else changed it meanwhile; look at it and try again",
    "MODEL_NOT_FOUND": "leave --model out to use the one that is served",
    "NO_WORKER": "`lorry status` shows what is running",
    "UNAUTHENTICATED": "name a file with your token by --token-file",
    "PERMISSION_DENIED": "use a token of a role that may do this",
    "DEADLINE_EXPIRED": "--timeout-s allows more time",
    "ENGINE_FAILURE": "the server's log has the cause",
}


def make_console(*, stderr: bool = False) -> Console:
    file = sys.stderr if stderr else sys.stdout
    return Console(file=file, width=None if file.isatty() else PIPED_WIDTH, highlight=False)


def make_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def complain(message: str) -> None:
    make_console(stderr=True).print(f"lorry: {message}", style="red", markup=False, soft_wrap=True)


def explain(error: Exception) -> str:
    """A failure with what to do next; in one line, but for the log of a service that failed."""
    if isinstance(error, ServiceFailed):
        return str(error)
    return " ".join(f"{_message(error)}{_next_step(error)}".split())


def _message(error: Exception) -> str:
    if is_unreachable(error):  # gRPC's text begins with how it tried
        return f"no connection: {str(error).rpartition('last error: ')[2]}"
    return str(error) or type(error).__name__


def is_unreachable(error: Exception) -> bool:
    """Whether no service answered at all."""
    return isinstance(error, RemoteError) and error.code is grpc.StatusCode.UNAVAILABLE


def _next_step(error: Exception) -> str:
    if not isinstance(error, LorryError):
        return ""
    step = NEXT_STEPS.get(error.reason)
    if isinstance(error, PermissionDenied) and "method" not in error.metadata:
        step = None  # it is not the role: the service's settings refuse this to everyone
    if is_unreachable(error):
        step = "`lorry up` starts the services here; --router and --store name others"
    if step is None and error.retry_after_s is not None:
        step = f"try again in {error.retry_after_s:g} s"
    return f" ({step})" if step else ""


def show_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
