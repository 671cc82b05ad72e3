"""Adapters through a worker process: a real store's images, an engine that computes nothing."""

import contextlib
import signal

import grpc.aio
import pytest

from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import AdapterInUse, InvalidRequest, VersionNotFound
from lorry.rpc.status import from_rpc, from_status
from lorry.v1 import worker_admin_service_pb2 as pb
from lorry.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from tests.support.adapters import lora_config, lora_tensors
from tests.support.attached_router import attached_router, until_ready
from tests.support.byte_model import write_byte_model
from tests.support.image_store import ImageStore, serving_images
from tests.support.scripted_engine import ECHO
from tests.support.waiting import until
from tests.support.worker_process import worker_process

UNKNOWN = b"u" * 32


class Stack:
    """A store, a worker, a router and an operator."""

    def __init__(self, store, worker, channel, router):
        self.store: ImageStore = store
        self.worker = worker
        self.channel = channel
        self.router = router
        self.operator = WorkerAdminServiceStub(channel)

    def add(self, rank):
        config = lora_config(r=rank)
        return self.store.add(config, lora_tensors(config, self.store._base_model.geometry))

    def held(self):
        """Versions in host memory, as the router was told."""
        versions: set[bytes] = set()
        for residency in self.router.residencies:
            versions = (versions | set(residency.host_added)) - set(residency.host_removed)
        return versions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_byte_model(tmp_path_factory.mktemp("model"))


@contextlib.asynccontextmanager
async def running_stack(model, shm_dir, *options, shared=True):
    shm_dir.mkdir()
    store = ImageStore(read_base_model(model), shm_dir)
    seen = shm_dir if shared else shm_dir.with_name("elsewhere") / "lorry"
    seen.parent.mkdir(exist_ok=True)
    async with serving_images(store) as address:
        arguments = [
            f"--store={address}",
            f"--shm-dir={seen}",
            f"--local-dir={shm_dir.with_name('local')}",
            *options,
        ]
        with worker_process(model, *arguments) as worker:
            async with grpc.aio.insecure_channel(worker.address) as channel:
                await until_ready(channel)
                async with attached_router(channel, "router") as router:
                    yield Stack(store, worker, channel, router)


@pytest.fixture
async def stack(model, tmp_path):
    async with running_stack(model, tmp_path / "shm") as stack:
        yield stack


@pytest.mark.parametrize("shared", [True, False])
async def test_a_request_is_served_with_the_stores_bytes(model, tmp_path, shared):
    async with running_stack(model, tmp_path / "shm", shared=shared) as stack:
        version = stack.add(rank=12)
        await stack.router.generate([ECHO], version=version)
        assert stack.router.tokens[1] == [12, sum(stack.store.images[version]) % 256, ECHO]
        assert stack.store.leases[version] == shared
        assert stack.held() == {version}


async def test_prefetched_versions_are_fetched_without_a_request(stack):
    versions = [stack.add(rank) for rank in (2, 4, 6)]
    await stack.router.prefetch(*versions)
    await stack.router.until(lambda: stack.held() == set(versions))


async def test_what_any_router_wants_is_prefetched(stack):
    first, second = stack.add(2), stack.add(4)
    async with attached_router(stack.channel, "other") as other:
        await other.prefetch(first)
        await stack.router.prefetch(second)
        await stack.router.until(lambda: stack.held() == {first, second})


async def test_a_prefetch_of_an_unknown_or_malformed_version_harms_nothing(stack):
    version = stack.add(2)
    await stack.router.prefetch(UNKNOWN, b"short", version)
    await stack.router.until(lambda: stack.held() == {version})


async def test_an_unknown_version_fails_its_request(stack):
    finished = await stack.router.generate([ECHO], version=UNKNOWN)
    assert isinstance(from_status(finished.error), VersionNotFound)
    assert (await stack.router.generate([ECHO], version=stack.add(2))).reason != finished.reason


async def test_a_pin_returns_once_the_version_is_there_and_protects_it(stack):
    version = stack.add(2)
    answer = await stack.operator.PinAdapter(pb.PinAdapterRequest(version=version), timeout=30)
    assert answer.status.pages_total == 100
    await stack.router.until(lambda: stack.held() == {version})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.operator.EvictAdapter(pb.EvictAdapterRequest(version=version), timeout=30)
    assert isinstance(from_rpc(refused.value), AdapterInUse)
    await stack.operator.UnpinAdapter(pb.UnpinAdapterRequest(version=version), timeout=30)
    await stack.operator.EvictAdapter(pb.EvictAdapterRequest(version=version), timeout=30)
    await stack.router.until(lambda: not stack.held())
    await until(lambda: stack.store.leases[version] == 0)


@pytest.mark.parametrize(("version", "error"), [(UNKNOWN, VersionNotFound), (b"x", InvalidRequest)])
async def test_a_pin_that_cannot_be_done_fails(stack, version, error):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.operator.PinAdapter(pb.PinAdapterRequest(version=version), timeout=30)
    assert type(from_rpc(refused.value)) is error


async def test_an_image_that_the_store_reclaims_is_given_back(stack):
    version = stack.add(2)
    await stack.router.generate([ECHO], version=version)
    stack.store.reclaim(version)
    await until(lambda: stack.store.leases[version] == 0)
    await stack.router.until(lambda: not stack.held())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_leases_end_with_the_worker(stack, number):
    version = stack.add(2)
    await stack.router.generate([ECHO], version=version)
    stack.worker.process.send_signal(number)
    await until(lambda: stack.store.leases[version] == 0)
