"""What the worker tells Prometheus, by scrapes of a real process's port."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from lorry.rpc.base_model import read_base_model
from lorry.v1 import worker_admin_service_pb2 as admin_pb
from lorry.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from tests.support.adapters import lora_config, lora_tensors
from tests.support.attached_router import AttachedRouter, attached_router, until_ready
from tests.support.byte_model import write_byte_model
from tests.support.image_store import ImageStore, serving_images
from tests.support.scrape import Scrape, metrics_url, scrape, scrape_until
from tests.support.scripted_engine import ECHO, FAIL, HOLD
from tests.support.waiting import until
from tests.support.worker_process import worker_process

UNKNOWN = b"u" * 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_byte_model(tmp_path_factory.mktemp("model"))


@contextlib.asynccontextmanager
async def attached_worker(
    model: Path, *options: str
) -> AsyncIterator[tuple[grpc.aio.Channel, AttachedRouter, str]]:
    """A channel to a ready worker, a router on it, and where its metrics are."""
    with worker_process(model, "--metrics-address=127.0.0.1:0", *options) as worker:
        async with grpc.aio.insecure_channel(worker.address) as channel:
            await until_ready(channel)
            await until(lambda: any("metrics at" in line for line in worker.log))
            async with attached_router(channel, "router") as router:
                yield channel, router, metrics_url(worker.log)


def check_reconciled(found: Scrape) -> None:
    ended = found.value("lorry_worker_requests_total")
    in_progress = found.value("lorry_worker_requests_in_progress")
    assert found.value("lorry_worker_requests_received_total") == ended + in_progress


async def test_every_submit_ends_in_one_outcome(model):
    async with attached_worker(model) as (channel, router, url):
        await router.generate([ECHO, ECHO])
        await router.generate([FAIL])
        await router.generate([ECHO], max_tokens=1_000_000)  # refused by the front
        held = await router.submit([HOLD])
        found = await scrape_until(url, lambda s: s.value("lorry_worker_requests_in_progress") == 1)
        check_reconciled(found)
        await router.cancel(held)
        await router.until(lambda: held in router.finished)
        drained = await router.submit([HOLD])
        await WorkerAdminServiceStub(channel).Drain(admin_pb.DrainRequest(grace=Duration(nanos=1)))
        await router.until(lambda: drained in router.finished)
        await router.generate([ECHO])

        found = await scrape_until(url, lambda s: not s.value("lorry_worker_requests_in_progress"))
        check_reconciled(found)
        requests = "lorry_worker_requests_total"
        assert found.value("lorry_worker_requests_received_total") == 6
        assert found.value(requests, code="OK") == 1
        assert found.value(requests, reason="POOL_TOO_SMALL") == 1
        assert found.value(requests, code="INVALID_ARGUMENT") == 1
        assert found.value(requests, code="CANCELLED") == 2
        assert found.value(requests, reason="DRAINING") == 1
        assert found.value("lorry_worker_prompt_tokens_total") == 2 + 1 + 1 + 1
        assert found.value("lorry_worker_output_tokens_total") == 3
        assert found.value("lorry_worker_draining") == 1
        assert found.value("lorry_worker_routers_attached") == 1


@pytest.mark.parametrize(("source", "other"), [("shm", "chunks"), ("chunks", "shm")])
async def test_fetches_are_counted_by_the_way_they_took(model, tmp_path, source, other):
    base_model = read_base_model(model)
    (tmp_path / "shm").mkdir()
    store = ImageStore(base_model, tmp_path / "shm")
    seen = tmp_path / "shm" if source == "shm" else tmp_path / "elsewhere"
    config = lora_config(r=8)
    version = store.add(config, lora_tensors(config, base_model.geometry))
    options = [f"--shm-dir={seen}", f"--local-dir={tmp_path / 'local'}"]
    async with (
        serving_images(store) as address,
        attached_worker(model, f"--store={address}", *options) as (_, router, url),
    ):
        await router.generate([ECHO], version=version)
        await router.generate([ECHO], version=version)
        await router.generate([ECHO], version=UNKNOWN)
        found = await scrape(url)
    image_bytes = len(store.images[version])
    assert found.value("lorry_worker_fetch_seconds_count", source=source) == 1
    assert found.value("lorry_worker_fetch_seconds_count", source=other) == 0
    assert found.value("lorry_worker_fetch_bytes_total", source=source) == image_bytes
    assert found.value("lorry_worker_images") == 1
    copied = image_bytes if source == "chunks" else 0
    assert found.value("lorry_worker_copied_image_bytes") == copied
    failures = found.value("lorry_worker_fetch_failures_total", reason="VERSION_NOT_FOUND")
    assert failures == found.value("lorry_worker_fetch_failures_total") == 1
