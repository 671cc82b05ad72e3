"""`lorry adapters`: push, list, show, change and delete."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lorry.client.adapter import Adapter, AdapterVersion
from lorry.client.commands import backends, store_admin
from lorry.client.commands.connection import DEFAULT, Connection
from lorry.client.commands.push_bars import PushBars
from lorry.client.console import make_console, make_table, show_bytes
from lorry.client.push import PARALLEL, Push, name_of, plan_pushes, push_all
from lorry.rpc.names import check_id

app = App(name="adapters", help="Manage the adapters of the store.")
store_admin.add_to(app)
backends.add_to(app)


@app.command
async def push(
    *paths: Path,
    name: str | None = None,
    config: Path | None = None,
    replace: Annotated[bool, Parameter(negative="")] = False,
    label: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    parallel: int = PARALLEL,
    connection: Connection = DEFAULT,
) -> None:
    """Upload adapters that PEFT saved, and publish them.

    What a name publishes already is not sent again. Of several adapters each is pushed to its own
    end; those that fail are named, and then the command fails too.

    Parameters
    ----------
    paths
        Directories with adapter_config.json and adapter_model.safetensors, or safetensors files
        with adapter_config.json beside them.
    name
        Id of the adapter: lower-case letters, digits, hyphens; default: the name of the directory,
        or of a file that is not adapter_model.safetensors. For one path only.
    config
        The adapter_config.json of a single safetensors file.
    replace
        Publish a new version if the name exists; running requests keep the old one.
    label
        KEY=VALUE to remember with the adapters. May be given up to 16 times.
    parallel
        Adapters to push at a time.
    """
    if parallel < 1:
        raise ValueError(f"--parallel must be at least 1, got {parallel}")
    pushes = _pushes(paths, name, config)
    labels = _labels(label)
    async with connection.client() as client:
        with PushBars(pushes) as bars:
            outcomes = await push_all(
                client.adapters,
                pushes,
                replace=replace,
                labels=labels,
                progress_of=bars.begin,
                ended=bars.end,
                parallel=parallel,
            )
    failures = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failures and len(pushes) == 1:
        raise failures[0]
    if failures:
        raise ValueError(f"{len(failures)} of {len(pushes)} adapters were not pushed")


def _pushes(paths: tuple[Path, ...], name: str | None, config: Path | None) -> list[Push]:
    if not paths:
        raise ValueError("name at least one directory or safetensors file to push")
    if name is None and config is None:
        return plan_pushes(paths)
    if len(paths) != 1:
        raise ValueError(f"--name and --config are for one path, got {len(paths)}")
    (path,) = paths
    adapter_id = name_of(path) if name is None else check_id(name, field="name")
    return [Push(path=path, adapter_id=adapter_id, config=config)]


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
async def versions(name: str, *, connection: Connection = DEFAULT) -> None:
    """List what a name has pointed to and can be rolled back to, newest first.

    Parameters
    ----------
    name
        Id or full name of the adapter.
    """
    table = make_table("", "version", "rank", "size", "created")
    async with connection.client() as client:
        published = (await client.adapters.show(name)).version
        for each in await client.adapters.versions(name):
            table.add_row(
                "*" if each.version == published else "",
                each.version,
                str(each.max_rank),
                show_bytes(each.weights_bytes),
                f"{each.created:%Y-%m-%d %H:%M:%S}",
            )
    make_console().print(table)


@app.command
async def update(
    name: str,
    *,
    label: Annotated[tuple[str, ...] | None, Parameter(negative="")] = None,
    description: str | None = None,
    version: str | None = None,
    connection: Connection = DEFAULT,
) -> None:
    """Change an adapter's labels or description, or roll it back to one of its versions.

    Parameters
    ----------
    name
        Id or full name of the adapter.
    label
        KEY=VALUE; all that are given take the place of all there are.
    description
        At most 1 KiB.
    version
        Digest in hex, or how it begins, of the version to publish; `lorry adapters versions` lists
        them. Requests that run keep theirs.
    """
    if label is None and description is None and version is None:
        raise ValueError("give at least one of --label, --description and --version")
    async with connection.client() as client:
        if version is not None:
            version = _one_of(name, await client.adapters.versions(name), version)
        adapter = await client.adapters.update(
            name,
            labels=None if label is None else _labels(label),
            description=description,
            version=version,
        )
    print(f"{adapter.name} version {adapter.version[:12]} rank {adapter.max_rank}")


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


def _one_of(name: str, versions: Sequence[AdapterVersion], beginning: str) -> str:
    """The version that begins so."""
    matches = [each.version for each in versions if each.version.startswith(beginning)]
    if len(matches) != 1:
        raise ValueError(
            f"--version {beginning!r} is the beginning of {len(matches)} versions; "
            f"`lorry adapters versions {name}` lists them all"
        )
    return matches[0]


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
