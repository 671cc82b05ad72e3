"""`lorry adapters pin`, `unpin`, `pins`, `imports`, `import-hub`: what operators ask of a store."""

from typing import Annotated

from cyclopts import App, Parameter

from lorry.client.commands.connection import DEFAULT, Connection
from lorry.client.console import make_console, make_table, show_bytes
from lorry.client.store_admin import ImportState


def add_to(app: App) -> None:
    app.command(pin)
    app.command(unpin)
    app.command(pins)
    app.command(imports)
    app.command(import_hub)


async def pin(name: str, *, connection: Connection = DEFAULT) -> None:
    """Keep an adapter's page images in the store's memory; needs the role admin.

    Parameters
    ----------
    name
        Id or full name of the adapter. What it publishes later is kept as well.
    """
    async with connection.client() as client:
        pinned = await client.store_admin.pin(name)
    print(f"pinned {pinned.name} version {pinned.version[:12]} {show_bytes(pinned.image_bytes)}")


async def unpin(name: str, *, connection: Connection = DEFAULT) -> None:
    """Let an adapter's page images be evicted again; needs the role admin.

    Parameters
    ----------
    name
        Id or full name of the adapter.
    """
    async with connection.client() as client:
        await client.store_admin.unpin(name)
    print(f"unpinned {name}")


async def pins(*, connection: Connection = DEFAULT) -> None:
    """List what is pinned in the store's memory; needs the role admin."""
    table = make_table("name", "version", "images", "size")
    async with connection.client() as client:
        for each in await client.store_admin.pins():
            size = show_bytes(each.image_bytes)
            table.add_row(each.name, each.version[:12] or "-", str(each.images), size)
    make_console().print(table)


async def imports(
    *,
    failed: Annotated[bool, Parameter(negative="")] = False,
    connection: Connection = DEFAULT,
) -> None:
    """List what lies in the store's import directory; needs the role admin.

    Parameters
    ----------
    failed
        Only what could not be imported.
    """
    table = make_table("directory", "state", "version", "error")
    async with connection.client() as client:
        only = ImportState.FAILED if failed else None
        async for each in client.store_admin.imports(only=only):
            table.add_row(each.path, each.state.value, each.version[:12], each.error)
    make_console().print(table, markup=False)


async def import_hub(
    source: str,
    *,
    name: str | None = None,
    replace: Annotated[bool, Parameter(negative="")] = False,
    connection: Connection = DEFAULT,
) -> None:
    """Have the store download an adapter from the Hugging Face hub; needs the role admin.

    The store must allow the repository (--hub-allow). --timeout-s bounds the whole import.

    Parameters
    ----------
    source
        ORG/NAME@REVISION: a commit, branch or tag; default: @main. The commit is remembered as the
        adapter's label hub-commit.
    name
        Id or full name of the adapter to publish; default: NAME.
    replace
        Publish a new version if the name exists.
    """
    repository, _, revision = source.partition("@")
    async with connection.client() as client:
        brought = await client.store_admin.import_from_hub(
            repository,
            revision or "main",
            name or repository.rpartition("/")[2],
            replace=replace,
        )
    adapter, note = brought.adapter, " (unchanged)" if brought.unchanged else ""
    print(f"{adapter.name} version {adapter.version[:12]} commit {brought.commit}{note}")
