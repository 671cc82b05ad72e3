"""Fetches of page images from a real gRPC store, and what the engine is told of them."""

import asyncio
import contextlib
import socket
from pathlib import Path

import grpc
import pytest

from lorry.kernels.page_layout import Dtype, ModelGeometry, PageLayout
from lorry.rpc.base_model import read_base_model
from lorry.rpc.channel import Credentials, open_channel
from lorry.rpc.errors import (
    AdapterIncompatible,
    DigestMismatch,
    LayoutUnsupported,
    LorryError,
    NoWorker,
    PermissionDenied,
    StoreFull,
    StoreUnavailable,
    VersionNotFound,
)
from lorry.rpc.shared_directory import SharedDirectory
from lorry.worker.failures import to_error
from lorry.worker.image_header import ImageFormat
from lorry.worker.image_source import ImageSource
from lorry.worker.images import ImageFetcher
from lorry.worker.messages import Command, ImageFailed, ImageReady, ReclaimImage
from tests.support.adapters import lora_config, lora_tensors
from tests.support.byte_model import write_byte_model
from tests.support.image_store import ImageStore, serving_images
from tests.support.waiting import until

TARGETS = ("q_proj", "v_proj", "down_proj")


class Bench:
    """A store, a fetcher, and what the fetcher has sent to the engine."""

    def __init__(self, store, source, channel, local, **limits) -> None:
        self.store: ImageStore = store
        self.local: Path = local  # the directory of files of the worker's own
        self.sent: list[Command] = []
        self.fetcher = ImageFetcher(source, channel, self.sent.append, **limits)

    def add(self, *, r: int = 8, **fields) -> bytes:
        config = lora_config(r=r, targets=TARGETS, **fields)
        geometry: ModelGeometry = self.store._base_model.geometry
        return self.store.add(config, lora_tensors(config, geometry, seed=r))

    async def fetch(self, version: bytes):
        """Fetch and return the answer."""
        count = len(self.sent)
        self.fetcher.fetch(version)
        await until(lambda: len(self.sent) > count)
        return self.sent[-1]

    async def failure(self, version: bytes) -> LorryError:
        answer = await self.fetch(version)
        assert isinstance(answer, ImageFailed)
        assert answer.version == version
        return to_error(answer.failure)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return read_base_model(write_byte_model(tmp_path_factory.mktemp("model")))


@contextlib.asynccontextmanager
async def bench_of(
    base_model,
    tmp_path,
    *,
    shared=True,
    max_fetches=8,
    max_rank=64,
    timeout_s=20.0,
    copied_bytes=1 << 30,
):
    shm_dir = tmp_path / "shm"
    shm_dir.mkdir()
    store = ImageStore(base_model, shm_dir)
    layout = PageLayout(geometry=base_model.geometry, dtype=Dtype.FP32)
    image_format = ImageFormat(layout=layout, model_digest=base_model.digest, max_rank=max_rank)
    with contextlib.closing(SharedDirectory(tmp_path / "local")) as local:
        async with (
            serving_images(store) as address,
            open_channel(address, Credentials(token="secret")) as channel,
        ):
            source = ImageSource(
                channel,
                [image_format],
                shm_dir=shm_dir if shared else tmp_path / "elsewhere",
                local=local,
            )
            limits = {
                "max_fetches": max_fetches,
                "timeout_s": timeout_s,
                "copied_bytes": copied_bytes,
            }
            bench = Bench(store, source, channel, local.path, **limits)
            yield bench
            await bench.fetcher.close()


@pytest.fixture
async def bench(base_model, tmp_path):
    async with bench_of(base_model, tmp_path) as bench:
        yield bench


@pytest.fixture
async def remote(base_model, tmp_path):
    """A worker that does not see the store's shared memory."""
    async with bench_of(base_model, tmp_path, shared=False) as bench:
        yield bench


def images_in(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix != ".lock"]


def content(image: ImageReady) -> bytes:
    return Path(image.path).read_bytes()[image.offset :][: image.image_bytes]


async def test_on_one_host_the_image_is_the_stores_file(bench):
    version = bench.add(r=12)
    image = await bench.fetch(version)
    assert isinstance(image, ImageReady)
    assert Path(image.path).parent == bench.store.shm_dir
    assert content(image) == bench.store.images[version]
    assert (image.version, image.rank) == (version, 12)
    assert [module.name for module in image.modules] == list(TARGETS)
    assert image.modules[0].scale_per_layer == [2.0, 2.0]
    assert not images_in(bench.local)


async def test_between_hosts_the_image_is_copied_in_chunks(remote):
    version = remote.add()
    image = await remote.fetch(version)
    assert Path(image.path).parent == remote.local
    assert content(image) == remote.store.images[version]
    assert remote.store.leases[version] == 0


async def test_the_open_call_is_the_lease_until_the_engine_releases_the_image(bench):
    version = bench.add()
    await bench.fetch(version)
    await until(lambda: bench.store.leases[version] == 1)
    bench.fetcher.release(version)
    await until(lambda: bench.store.leases[version] == 0)


async def test_a_copied_image_goes_when_the_engine_releases_it(remote):
    version = remote.add()
    await remote.fetch(version)
    remote.fetcher.release(version)
    await until(lambda: not images_in(remote.local))


async def test_oldest_copies_are_asked_back_when_there_are_too_many(base_model, tmp_path):
    async with bench_of(base_model, tmp_path, shared=False, copied_bytes=1) as bench:
        first, second, third = (bench.add(r=r) for r in (2, 4, 8))
        await bench.fetch(first)
        assert len(bench.sent) == 1
        await bench.fetch(second)
        await until(lambda: len(bench.sent) == 3)
        assert bench.sent[2] == ReclaimImage(first)
        bench.fetcher.release(first)
        await until(lambda: len(images_in(bench.local)) == 1)
        await bench.fetch(third)
        await until(lambda: len(bench.sent) == 5)
        assert bench.sent[4] == ReclaimImage(second)


async def test_an_image_can_be_fetched_again_at_once_after_its_release(remote):
    version = remote.add()
    await remote.fetch(version)
    remote.fetcher.release(version)
    image = await remote.fetch(version)
    await asyncio.sleep(0)
    assert content(image) == remote.store.images[version]


async def test_closing_gives_back_every_lease_and_file(base_model, tmp_path):
    async with bench_of(base_model, tmp_path) as bench:
        version = bench.add()
        await bench.fetch(version)
        await bench.fetcher.close()
        await until(lambda: bench.store.leases[version] == 0)


async def test_a_released_fetch_is_given_up_and_not_answered(bench):
    bench.store.gate.clear()
    version = bench.add()
    bench.fetcher.fetch(version)
    await until(lambda: bench.store.open_fetches == 1)
    bench.fetcher.release(version)
    await until(lambda: bench.store.open_fetches == 0)
    assert not bench.sent


async def test_a_version_is_fetched_once_however_often_it_is_asked_for(bench):
    version = bench.add()
    bench.fetcher.fetch(version)
    await bench.fetch(version)
    assert bench.store.fetches == [version]


async def test_the_stores_wish_for_its_memory_reaches_the_engine(bench):
    version = bench.add()
    await bench.fetch(version)
    bench.store.reclaim(version)
    await until(lambda: ReclaimImage(version) in bench.sent)
    assert bench.store.leases[version] == 1  # until the engine has unmapped it
    bench.fetcher.release(version)
    await until(lambda: bench.store.leases[version] == 0)


async def test_a_lost_lease_makes_the_engine_give_the_image_up(bench):
    version = bench.add()
    await bench.fetch(version)
    bench.store.end_leases()
    await until(lambda: ReclaimImage(version) in bench.sent)


async def test_the_stores_token_is_shown(bench):
    await bench.fetch(bench.add())
    assert bench.store.metadata["authorization"] == "Bearer secret"


async def test_at_most_so_many_images_are_fetched_at_the_same_time(base_model, tmp_path):
    async with bench_of(base_model, tmp_path, max_fetches=2) as bench:
        versions = [bench.add(r=rank) for rank in range(1, 7)]
        bench.store.gate.clear()
        for version in versions:
            bench.fetcher.fetch(version)
        await until(lambda: bench.store.open_fetches == 2)
        bench.store.gate.set()
        await until(lambda: len(bench.sent) == 6)
        assert bench.store.most_open_fetches == 2


async def test_an_unavailable_store_is_asked_again(bench):
    bench.store.failures = iter([NoWorker("starting"), StoreFull("leased", retry_after_s=1)])
    assert isinstance(await bench.fetch(bench.add()), ImageReady)
    assert len(bench.store.fetches) == 3


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (LayoutUnsupported("revision"), AdapterIncompatible),
        (VersionNotFound("none"), VersionNotFound),
        (StoreFull("larger than the store"), StoreFull),
        (PermissionDenied("token"), StoreUnavailable),
        (ValueError("a defect of the store"), StoreUnavailable),
    ],
)
async def test_a_refusal_is_final_and_tells_clients_no_more_than_they_need(bench, raised, expected):
    bench.store.failures = iter([raised])
    assert type(await bench.failure(bench.add())) is expected
    assert len(bench.store.fetches) == 1


@pytest.mark.parametrize("raised", [StoreFull, StoreUnavailable])
async def test_a_store_that_stays_unavailable_fails_the_fetch_in_the_end(
    base_model, tmp_path, raised
):
    async with bench_of(base_model, tmp_path, timeout_s=0.3) as bench:
        bench.store.failures = (raised("still", retry_after_s=1) for _ in range(1000))
        assert type(await bench.failure(bench.add())) is raised


async def test_a_store_that_never_answers_fails_the_fetch_in_the_end(base_model, tmp_path):
    async with bench_of(base_model, tmp_path, timeout_s=0.2) as bench:
        bench.store.gate.clear()
        error = await bench.failure(bench.add())
        assert error.code is grpc.StatusCode.UNAVAILABLE
        await until(lambda: bench.store.open_fetches == 0)


async def test_a_failed_version_can_be_fetched_again(bench):
    version = bench.add()
    bench.store.failures = iter([PermissionDenied("not yet")])
    await bench.failure(version)
    assert isinstance(await bench.fetch(version), ImageReady)


async def test_an_adapter_of_a_larger_rank_than_served_is_incompatible(base_model, tmp_path):
    async with bench_of(base_model, tmp_path, max_rank=8) as bench:
        error = await bench.failure(bench.add(r=9))
        assert isinstance(error, AdapterIncompatible)
        assert error.metadata == {"rank": "9", "maxRank": "8"}
        assert isinstance(await bench.fetch(bench.add(r=8)), ImageReady)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: setattr(header, "pages", header.pages + 1),
        lambda header: setattr(header, "image_bytes", header.image_bytes - 1),
        lambda header: setattr(header, "version", b"another"),
        lambda header: setattr(header, "rank", 0),
        lambda header: setattr(header.layout, "row_unit", 1),
        lambda header: setattr(header.modules[1], "row_offset", 0),
        lambda header: setattr(header.modules[1], "b_row_offset", 0),
        lambda header: setattr(header.modules[0], "name", "lm_head"),
        lambda header: header.modules[0].scale_per_layer.pop(),
        lambda header: header.modules[0].scale_per_layer.__setitem__(0, float("nan")),
        lambda header: header.modules.reverse(),
    ],
)
async def test_a_header_that_is_not_this_workers_arithmetic_is_refused(bench, change):
    def tamper(message):
        if message.HasField("header"):
            change(message.header)

    bench.store.tamper = tamper
    version = bench.add()
    assert isinstance(await bench.failure(version), AdapterIncompatible)
    await until(lambda: bench.store.leases[version] == 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda chunk: setattr(chunk, "crc32c", chunk.crc32c ^ 1),
        lambda chunk: setattr(chunk, "offset", chunk.offset + 1),
        lambda chunk: setattr(chunk, "data", chunk.data * 1000),
    ],
)
async def test_a_damaged_chunk_is_refused_and_leaves_no_file(remote, change):
    def tamper(message):
        if message.HasField("chunk") and message.chunk.offset:
            change(message.chunk)

    remote.store.tamper = tamper
    assert isinstance(await remote.failure(remote.add()), DigestMismatch)
    assert not images_in(remote.local)


async def test_an_image_that_differs_from_its_header_is_refused(remote):
    def tamper(message):
        if message.HasField("header"):
            message.header.image_crc32c ^= 1

    remote.store.tamper = tamper
    assert isinstance(await remote.failure(remote.add()), DigestMismatch)


@pytest.mark.parametrize("name", ["../secret", "", "missing", "link"])
async def test_a_handle_that_is_no_plain_file_there_is_not_followed(bench, tmp_path, name):
    (tmp_path / "secret").write_bytes(b"x")
    (bench.store.shm_dir / "link").symlink_to(tmp_path / "secret")

    def tamper(message):
        if message.HasField("shm"):
            message.shm.name = name

    bench.store.tamper = tamper
    image = await bench.fetch(bench.add())
    assert Path(image.path).parent == bench.local  # it came as chunks instead


async def test_a_worker_without_room_for_the_copy_fails_the_fetch(
    base_model, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    async with bench_of(base_model, tmp_path, shared=False, timeout_s=0.2) as remote:
        assert isinstance(await remote.failure(remote.add()), StoreFull)
        assert not images_in(remote.local)


async def test_copies_make_room_for_the_next_where_their_memory_is_full(
    base_model, tmp_path, monkeypatch
):
    create = SharedDirectory.create

    def create_alone(directory, num_bytes):
        if list(directory.path.glob("*.new.*")):
            raise StoreFull("no room", retry_after_s=0.01)
        return create(directory, num_bytes)

    monkeypatch.setattr(SharedDirectory, "create", create_alone)
    async with bench_of(base_model, tmp_path, shared=False) as remote:
        first = await remote.fetch(remote.add())
        assert isinstance(first, ImageReady)
        remote.fetcher.fetch(second := remote.add(r=16))
        await until(lambda: ReclaimImage(first.version) in remote.sent)
        remote.fetcher.release(first.version)
        await until(
            lambda: isinstance(remote.sent[-1], ImageReady) and remote.sent[-1].version == second
        )


async def test_a_store_that_starts_late_is_waited_for(base_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    layout = PageLayout(geometry=base_model.geometry, dtype=Dtype.FP32)
    image_format = ImageFormat(layout=layout, model_digest=base_model.digest, max_rank=64)
    sent: list[Command] = []
    with contextlib.closing(SharedDirectory(tmp_path / "local")) as local:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            source = ImageSource(channel, [image_format], shm_dir=tmp_path, local=local)
            fetcher = ImageFetcher(
                source, channel, sent.append, max_fetches=1, timeout_s=30, copied_bytes=1 << 30
            )
            store = ImageStore(base_model, tmp_path)
            config = lora_config(targets=TARGETS)
            version = store.add(config, lora_tensors(config, base_model.geometry))
            fetcher.fetch(version)
            await asyncio.sleep(0.2)
            assert not sent
            async with serving_images(store, port):
                await until(lambda: len(sent) == 1)
                await fetcher.close()
    assert isinstance(sent[0], ImageReady)
