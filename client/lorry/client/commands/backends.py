"""`lorry adapters copy` and `check`: what is done to the backends of stores, without a store."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lorry.client.console import complain, explain, make_console, make_table
from lorry.rpc.command import extra
from lorry.rpc.errors import LorryError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What a redis:// URL does not hold."""

    password_file: Path | None = None
    """File that holds the password of each Redis whose URL has none."""

    ca_file: Path | None = None
    """Certificates (PEM) of who may sign that of a rediss:// Redis; default: the system's."""


NONE = Secrets()


def add_to(app: App) -> None:
    app.command(copy)
    app.command(check)


def copy(
    *,
    source: Annotated[str, Parameter(name="--from", env_var="LORRY_COPY_FROM")],
    target: Annotated[str, Parameter(name="--to", env_var="LORRY_COPY_TO")],
    replace: Annotated[bool, Parameter(negative="")] = False,
    secrets: Secrets = NONE,
) -> None:
    """Copy all adapters from one backend to another, with versions, labels, times and etags.

    What is there already is not sent again, so a copy that was broken off may be repeated. Stores
    may run on a Redis meanwhile, but not on a directory.

    Parameters
    ----------
    source
        file:///DIRECTORY or redis[s]://[USER[:PASSWORD]@]HOST[:PORT][/DATABASE].
    target
        The same; it is made if there is nothing.
    replace
        Names that the target has otherwise become those of the source.
    """
    with extra("adapter-store"):
        from lorry.adapter_store.copying import Copy
    with (
        _opened(source, None, secrets) as from_backend,
        _opened(target, from_backend.model_digest, secrets) as to_backend,
    ):
        work = Copy(from_backend, to_backend, replace=replace)
        failed = 0
        with _bar(sum(work.num_bytes(step) for step in work.steps)) as (bar, task):
            for step in work.steps:
                bar.update(task, description=str(step.adapter.name))
                try:
                    work.run(step, lambda sent: bar.advance(task, sent))
                except LorryError as error:
                    failed += 1
                    complain(f"{step.adapter.name}: {explain(error)}")
    print(f"copied {len(work.steps) - failed} adapters, {failed} failed")
    if failed:
        sys.exit(1)


def check(
    *,
    backend: Annotated[str, Parameter(env_var="LORRY_CHECK_BACKEND")],
    repair_from: Annotated[str | None, Parameter(env_var="LORRY_CHECK_REPAIR_FROM")] = None,
    secrets: Secrets = NONE,
) -> None:
    """Verify every version that a backend keeps; what is damaged is put aside.

    Exits with 1 if anything is damaged or missing and was not repaired, or a Redis miscounts.

    Parameters
    ----------
    backend
        file:///DIRECTORY or redis[s]://[USER[:PASSWORD]@]HOST[:PORT][/DATABASE].
    repair_from
        Another backend, from which to take what is damaged or missing.
    """
    with extra("adapter-store"):
        from lorry.adapter_store import checking
    with contextlib.ExitStack() as stack:
        checked = stack.enter_context(_opened(backend, None, secrets))
        copy: Any = None
        if repair_from is not None:
            copy = stack.enter_context(_opened(repair_from, checked.model_digest, secrets))
        found = checking.entries(checked)
        table, num_bad = make_table("version", "adapters", "state"), 0
        with _bar(sum(entry.version.file_bytes for entry in found)) as (bar, task):
            for entry in found:
                state = checking.check(checked, entry)
                if state is not None:
                    state, repaired = _repaired(checked, entry, state, copy)
                    num_bad += not repaired
                    names = ", ".join(str(name) for name in entry.names)
                    table.add_row(entry.version.digest.hex(), names, state)
                bar.advance(task, entry.version.file_bytes)
        problems = checked.problems()
    if table.row_count:
        make_console().print(table)
    for problem in problems:
        complain(problem)
    print(f"checked {len(found)} versions, {table.row_count} damaged or missing, {num_bad} still")
    if num_bad or problems:
        sys.exit(1)


def _repaired(checked: Any, entry: Any, state: str, copy: Any) -> tuple[str, bool]:
    """What there is to say of a bad content, and whether it is good now."""
    from lorry.adapter_store import checking

    if copy is None:
        return state, False
    try:
        checking.repair(checked, entry, copy=copy)
    except LorryError as error:
        return f"{state}; not repaired: {explain(error)}", False
    return f"{state}; repaired", True


@contextlib.contextmanager
def _opened(url: str, model_digest: bytes | None, secrets: Secrets) -> Iterator[Any]:
    with extra("adapter-store"):
        from lorry.adapter_store.backend_url import BackendUrl
    parsed = BackendUrl.parse(url, password_file=secrets.password_file, ca_file=secrets.ca_file)
    with contextlib.closing(parsed.open(model_digest=model_digest)) as backend:
        yield backend


@contextlib.contextmanager
def _bar(num_bytes: int) -> Iterator[tuple[Progress, Any]]:
    """A bar of bytes, on a terminal only."""
    console = make_console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield bar, bar.add_task("", total=num_bytes)
