"""`lorry adapters`: push, list, show and delete."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lorry.client.adapters import Adapter, default_id
from lorry.client.commands.connection import DEFAULT, Connection
from lorry.client.console import make_console, make_table, progress_of, show_bytes

app = App(name="adapters", help="Manage the adapters of the store.")


@app.command
async def push(
    directory: Path,
    *,
    name: str | None = None,
    replace: Annotated[bool, Parameter(negative="")] = False,
    label: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    connection: Connection = DEFAULT,
) -> None:
    """Upload an adapter that PEFT saved, and publish it.

    Parameters
    ----------
    directory
        Holds adapter_config.json and adapter_model.safetensors.
    name
        Id of the adapter: lower-case letters, digits, hyphens; default: the directory's name.
    replace
        Publish a new version if the name exists; running requests keep the old one.
    label
        KEY=VALUE to remember with the adapter. May be given up to 16 times.
    """
    console = make_console(stderr=True)
    async with connection.client() as client:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bars:
            task = bars.add_task(f"pushing {name or default_id(directory)}", total=None)
            adapter = await client.adapters.push(
                directory,
                adapter_id=name,
                replace=replace,
                labels=_labels(label),
                progress=progress_of(lambda **fields: bars.update(task, **fields)),
            )
    print(f"{adapter.name} version {adapter.version[:12]} rank {adapter.max_rank}")


@app.command(name="list")
async def list_adapters(*, filter: str = "", connection: Connection = DEFAULT) -> None:
    """List the adapters by name.

    Parameters
    ----------
    filter
        `labels.KEY="VALUE"` and `method=LORA`, joined by AND; default: all adapters.
    """
    table = make_table("name", "version", "rank", "size", "updated", "labels")
    async with connection.client() as client:
        async for adapter in client.adapters.list(filter=filter):
            table.add_row(
                adapter.name,
                adapter.version[:12],
                str(adapter.max_rank),
                show_bytes(adapter.weights_bytes),
                f"{adapter.updated:%Y-%m-%d %H:%M:%S}",
                _show_labels(adapter),
            )
    make_console().print(table)


@app.command
async def show(name: str, *, connection: Connection = DEFAULT) -> None:
    """Show one adapter.

    Parameters
    ----------
    name
        Id or full name of the adapter.
    """
    async with connection.client() as client:
        adapter = await client.adapters.show(name)
    table = make_table("", "")
    table.show_header = False
    for field, value in _facts(adapter).items():
        table.add_row(field, value)
    make_console().print(table)


@app.command
async def delete(
    name: str,
    *,
    missing_ok: Annotated[bool, Parameter(negative="")] = False,
    connection: Connection = DEFAULT,
) -> None:
    """Remove an adapter's name; requests that run with it finish.

    Parameters
    ----------
    name
        Id or full name of the adapter.
    missing_ok
        Succeed if there is no such adapter.
    """
    async with connection.client() as client:
        await client.adapters.delete(name, missing_ok=missing_ok)
    print(f"deleted {name}")


def _labels(assignments: tuple[str, ...]) -> dict[str, str]:
    for assignment in assignments:
        if "=" not in assignment:
            raise ValueError(f"--label must be KEY=VALUE, got {assignment!r}")
    return dict(assignment.split("=", 1) for assignment in assignments)


def _facts(adapter: Adapter) -> dict[str, str]:
    return {
        "name": adapter.name,
        "version": adapter.version,
        "largest rank": str(adapter.max_rank),
        "modules": ", ".join(adapter.modules),
        "size": show_bytes(adapter.weights_bytes),
        "labels": _show_labels(adapter),
        "description": adapter.description,
        "created": adapter.created.isoformat(timespec="seconds"),
        "updated": adapter.updated.isoformat(timespec="seconds"),
        "etag": adapter.etag,
    }


def _show_labels(adapter: Adapter) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items()))
