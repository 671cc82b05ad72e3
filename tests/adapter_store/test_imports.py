"""The watched import directory of a real store, looked at when the test says so."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lorry.adapter_store import imports as module
from lorry.adapter_store.import_scan import Found, scan
from lorry.adapter_store.imports import TRANSITIONS, Import, Imports, ImportState, importing
from lorry.adapter_store.ingest import Ingested, Source, ingest
from lorry.adapter_store.limits import Limits, TenantLimits
from lorry.adapter_store.store import Store
from lorry.rpc.errors import AdapterNotFound
from lorry.rpc.names import AdapterName
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1 import store_admin_service_pb2 as admin_pb
from tests.support.adapter_store import RunningStore, running_store
from tests.support.adapters import lora_config, lora_files, lora_tensors
from tests.support.waiting import until

CONFIG = lora_config(r=4)
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

BAD_PATHS = [
    "Default/sql",
    "default/SQL",
    "default/s\u0441l",  # a Cyrillic letter
    "def\u200bault/sql",
    "default/a b",
    "default/a\nb",
]


def write(directory: Path, *, seed: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config_json, weights = lora_files(CONFIG, lora_tensors(CONFIG, seed=seed))
    (directory / CONFIG_NAME).write_text(config_json)
    (directory / WEIGHTS_NAME).write_bytes(weights)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "import"
    path.mkdir()
    return path


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningStore]:
    limits = Limits(tenants={"poor": TenantLimits(adapters=0)})
    async with running_store(tmp_path, limits=limits) as store:
        yield store


def watch(running: RunningStore, root: Path, *, delete: bool = False) -> Imports:
    return Imports(running.store, root, delete=delete)


async def settle(imports: Imports) -> dict[str, Import]:
    """Look twice: files that are the same in both looks are taken."""
    await imports.look()
    await imports.look()
    return {each.found.path: each for each in imports.all}


async def version_of(running: RunningStore, name: str) -> bytes:
    return (await running.client.get(name)).version


async def test_what_lies_there_is_published_under_its_directorys_name(
    running: RunningStore, root: Path
) -> None:
    write(root / "acme" / "sql")
    write(root / "default" / "sql", seed=1)
    imports = watch(running, root)
    await imports.look()
    assert {each.state for each in imports.all} == {ImportState.WAITING}
    await imports.look()
    for each in imports.all:
        assert each.state is ImportState.IMPORTED
        assert each.found.name is not None
        adapter = running.store.catalogue.get(each.found.name)
        assert adapter is not None
        assert adapter.published == each.version


async def test_what_is_still_written_is_not_taken(running: RunningStore, root: Path) -> None:
    write(root / "default" / "sql")
    weights = root / "default" / "sql" / WEIGHTS_NAME
    content = weights.read_bytes()
    imports = watch(running, root)
    for end in (10, 1000, len(content)):
        weights.write_bytes(content[:end])
        await imports.look()
        assert [each.state for each in imports.all] == [ImportState.WAITING]
    await imports.look()
    assert [each.state for each in imports.all] == [ImportState.IMPORTED]


async def test_a_change_is_published_anew_and_running_versions_stay(
    running: RunningStore, root: Path
) -> None:
    imports = watch(running, root)
    write(root / "default" / "sql")
    await settle(imports)
    first = await version_of(running, "adapters/sql")
    write(root / "default" / ".next", seed=1)
    os.rename(root / "default" / "sql", root / "default" / ".last")
    os.rename(root / "default" / ".next", root / "default" / "sql")
    await settle(imports)
    second = await version_of(running, "adapters/sql")
    assert first != second
    client = running.client
    history = pb.ListAdapterVersionsRequest(name="adapters/sql")
    versions = (await client.call(client.adapters.ListAdapterVersions, history)).versions
    assert [version.digest for version in versions] == [second, first]


async def test_what_was_imported_in_an_earlier_life_is_not_published_again(
    running: RunningStore, root: Path
) -> None:
    write(root / "default" / "sql")
    await settle(watch(running, root))
    revision = running.store.catalogue.revision
    again = await settle(watch(running, root))
    assert again["default/sql"].state is ImportState.IMPORTED
    assert running.store.catalogue.revision == revision


@pytest.mark.parametrize("delete", [False, True])
async def test_a_name_outlives_its_directory_unless_it_should_not(
    running: RunningStore, root: Path, delete: bool
) -> None:
    write(root / "default" / "sql")
    write(root / "default" / "changed", seed=1)
    imports = watch(running, root, delete=delete)
    await settle(imports)
    adapter = await running.client.get("adapters/changed")
    weights = lora_files(CONFIG, lora_tensors(CONFIG, seed=2))[1]
    await running.client.push("changed", CONFIG, weights, etag=adapter.etag)
    for name in ("sql", "changed"):
        os.rename(root / "default" / name, root / f".{name}")
    await imports.look()
    assert imports.all == []
    await running.client.get("adapters/changed")
    if delete:
        with pytest.raises(AdapterNotFound):
            await running.client.get("adapters/sql")
    else:
        await running.client.get("adapters/sql")


async def test_hostile_directories_are_refused_and_told(running: RunningStore, root: Path) -> None:
    outside = root.parent / "outside"
    write(outside / "sql")
    write(root / "default" / "good")
    for path in BAD_PATHS:
        write(root / path)
    (root / "default" / "link").symlink_to(outside / "sql")
    (root / "linked-tenant").symlink_to(outside)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        write(root / "default" / f"link-{name[8]}")
        (root / "default" / f"link-{name[8]}" / name).unlink()
        (root / "default" / f"link-{name[8]}" / name).symlink_to(outside / "sql" / name)
    write(root / "default" / "pipe")
    (root / "default" / "pipe" / WEIGHTS_NAME).unlink()
    os.mkfifo(root / "default" / "pipe" / WEIGHTS_NAME)
    pickled = root / "default" / "pickle"
    write(pickled)
    os.rename(pickled / WEIGHTS_NAME, pickled / "adapter_model.bin")
    (root / "default" / "file").write_text("no directory")
    write(root / "default" / "damaged")
    (root / "default" / "damaged" / WEIGHTS_NAME).write_bytes(b"\xff" * 100)
    write(root / "default" / "latin")
    (root / "default" / "latin" / CONFIG_NAME).write_bytes(b'{"r": "\xe9"}')
    write(root / "poor" / "sql")
    states = await settle(watch(running, root))
    assert [path for path, each in states.items() if not each.error] == ["default/good"]
    assert all(path.isascii() for path in states)
    assert running.store.catalogue.num_adapters == 1
    assert states["poor/sql"].try_again_s is not None
    assert states["default/damaged"].try_again_s is None
    assert running.store.uploads.num_open == 0
    assert not list((running.backend_dir / "uploads").iterdir())


async def test_no_defect_ends_the_watch(
    running: RunningStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[Path] = []

    def scan_at_second_try(directory: Path) -> list[Found]:
        scans.append(directory)
        if len(scans) == 1:
            raise RuntimeError
        return scan(directory)

    async def ingest_all_but_one(store: Store, name: AdapterName, source: Source) -> Ingested:
        if name.adapter == "bad":
            raise RuntimeError
        return await ingest(store, name, source)

    monkeypatch.setattr(module, "PERIOD_S", 0.01)
    monkeypatch.setattr(module, "scan", scan_at_second_try)
    monkeypatch.setattr(module, "ingest", ingest_all_but_one)
    for name in ("bad", "good"):
        write(root / "default" / name)
    async with importing(running.store, root, delete=False) as imports:
        states = {"default/bad": ImportState.FAILED, "default/good": ImportState.IMPORTED}
        await until(lambda: {each.found.path: each.state for each in imports.all} == states)


async def test_a_directory_that_is_swapped_for_a_link_is_not_followed(
    running: RunningStore, root: Path
) -> None:
    write(root.parent / "outside")
    write(root / "default" / "sql")
    imports = watch(running, root)
    await imports.look()
    found = imports.all[0].found
    os.rename(root / "default" / "sql", root / ".sql")
    (root / "default" / "sql").symlink_to(root.parent / "outside")
    with pytest.raises(OSError, match="sql"):
        await imports._publish(found)


async def test_operators_list_what_failed_in_pages(tmp_path: Path, root: Path) -> None:
    for number in range(5):
        write(root / "default" / f"Bad-{number}")
    async with running_store(tmp_path, import_dir=root) as running:
        client, request = running.client, admin_pb.ListImportsRequest(page_size=2)
        request.state = admin_pb.Import.STATE_FAILED
        paths: list[str] = []
        while not paths or request.page_token:
            page = await client.call(client.admin.ListImports, request)
            paths += [each.path for each in page.imports]
            assert all("must match" in each.error for each in page.imports)
            request.page_token = page.next_page_token
        assert paths == [f"default/Bad-{number}" for number in range(5)]


def test_states_move_as_the_table_says(root: Path) -> None:
    write(root / "default" / "sql")
    (found,) = scan(root)
    for before in ImportState:
        for after in ImportState:
            each = Import(found, before)
            if after in TRANSITIONS[before]:
                each.move_to(after)
                assert each.state is after
            else:
                with pytest.raises(AssertionError):
                    each.move_to(after)


def test_the_number_of_directories_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorry.adapter_store.import_scan.MAX_DIRECTORIES", 3)
    for number in range(4):
        (root / "default" / f"a-{number}").mkdir(parents=True)
        (root / "other" / f"a-{number}").mkdir(parents=True)
    assert [each.path for each in scan(root)] == [f"default/a-{number}" for number in range(3)]
