"""How a worker begins and ends, as the processes around it see it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

import grpc.aio
import psutil
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.rpc.errors import Draining, SlowReader, WorkerLost
from lorry.rpc.protocol import PROTOCOL_REVISION
from lorry.rpc.status import from_rpc, from_status
from lorry.v1 import common_pb2
from lorry.v1 import worker_admin_service_pb2 as admin_pb
from lorry.v1 import worker_service_pb2 as pb
from lorry.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from tests.support.attached_router import attached_router, until_ready, worker_stub
from tests.support.byte_model import write_byte_model
from tests.support.scripted_engine import BABBLE, CRASH, ECHO, FLOOD, HANG, HOLD
from tests.support.waiting import until
from tests.support.worker_process import worker_process

LENGTH = common_pb2.FINISH_REASON_LENGTH


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_byte_model(tmp_path_factory.mktemp("model"))


@contextlib.asynccontextmanager
async def attached_worker(model, *options, **environment):
    """A ready worker, a channel to it and a router on it."""
    with worker_process(model, *options, **environment) as worker:
        async with grpc.aio.insecure_channel(worker.address) as channel:
            await until_ready(channel)
            async with attached_router(channel, "router") as router:
                yield worker, channel, router


async def exit_code(worker):
    return await asyncio.to_thread(worker.wait)


async def health(channel):
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service="readiness"))).status


async def test_sigterm_ends_an_idle_worker_and_its_engine(model):
    async with attached_worker(model) as (worker, _, router):
        engine = worker.engine
        worker.process.send_signal(signal.SIGTERM)
        assert await exit_code(worker) == 0
        assert not engine.is_running()
        assert await router.until_ended() is None
        assert worker.later_output() == ""
        assert "Traceback" not in "".join(worker.log)


async def test_ctrl_c_reaches_the_engine_only_through_the_front(model):
    async with attached_worker(model) as (worker, _, router):
        running = await router.submit([ECHO], max_tokens=100)
        await router.until(lambda: bool(router.tokens[running]))
        os.killpg(worker.process.pid, signal.SIGINT)
        await router.until(lambda: running in router.finished)
        assert router.finished[running].reason == LENGTH
        assert await exit_code(worker) == 0


async def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(model):
    async with attached_worker(model) as (worker, channel, router):
        running = await router.submit([ECHO], max_tokens=300)
        await router.until(lambda: bool(router.tokens[running]))
        worker.process.send_signal(signal.SIGTERM)
        await router.until(lambda: router.last_status.draining)
        assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        refused = await router.generate([ECHO])
        assert isinstance(from_status(refused.error), Draining)
        await router.until(lambda: running in router.finished)
        assert router.finished[running].reason == LENGTH
        assert len(router.tokens[running]) == 300
        assert await exit_code(worker) == 0


async def test_what_still_runs_after_the_grace_is_aborted(model):
    async with attached_worker(model, "--grace-s=0.2") as (worker, _, router):
        held = await router.submit([HOLD])
        await router.until(lambda: router.last_status.running == 1)
        worker.process.send_signal(signal.SIGTERM)
        await router.until(lambda: held in router.finished)
        assert isinstance(from_status(router.finished[held].error), Draining)
        assert await router.until_ended() is None
        assert await exit_code(worker) == 0


async def test_sigterm_while_the_model_loads_ends_the_worker(model):
    with worker_process(model, SCRIPTED_ENGINE="never-ready") as worker:
        engine = worker.engine
        worker.process.send_signal(signal.SIGTERM)
        assert await exit_code(worker) == 0
        assert not engine.is_running()


async def test_a_killed_engine_ends_the_streams_and_the_worker(model):
    async with attached_worker(model) as (worker, _, router):
        held = await router.submit([HOLD])
        await router.until(lambda: router.last_status.running == 1)
        worker.engine.kill()
        assert isinstance(await router.until_ended(), WorkerLost)
        assert held not in router.finished  # the router may send it to another worker
        assert await exit_code(worker) == 1
        assert "exit code -9" in "".join(worker.log)
        assert "Traceback" not in "".join(worker.log)


async def test_a_crash_is_logged_with_what_the_engine_said_last(model):
    async with attached_worker(model) as (worker, _, router):
        await router.submit([CRASH])
        assert isinstance(await router.until_ended(), WorkerLost)
        assert await exit_code(worker) == 1
        log = "".join(worker.log)
        assert "exit code 7; its last lines:\n  the device fell off the bus" in log


async def test_a_hung_engine_is_killed(model):
    async with attached_worker(model, "--engine-silence-s=1") as (worker, _, router):
        engine = worker.engine
        await router.submit([HANG])
        assert isinstance(await router.until_ended(), WorkerLost)
        assert await exit_code(worker) == 1
        assert not engine.is_running()


async def test_an_engine_that_breaks_the_protocol_ends_the_worker(model):
    async with attached_worker(model) as (worker, _, router):
        await router.submit([BABBLE])
        assert isinstance(await router.until_ended(), WorkerLost)
        assert await exit_code(worker) == 1


@pytest.mark.parametrize(
    ("beginning", "logged"),
    [("die-at-start", "no such device"), ("never-ready", "did not start in time")],
)
async def test_an_engine_that_does_not_start_ends_the_worker(model, beginning, logged):
    with worker_process(model, "--start-timeout-s=3", SCRIPTED_ENGINE=beginning) as worker:
        assert await exit_code(worker) == 1
        assert logged in "".join(worker.log)


async def test_the_engine_dies_with_a_killed_front(model):
    async with attached_worker(model) as (worker, _, _):
        engine = worker.engine
        worker.process.kill()
        await until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


async def test_a_router_that_does_not_read_loses_its_stream_and_delays_no_other(model):
    async with attached_worker(model) as (_, channel, router):
        call = worker_stub(channel).Attach()
        hello = pb.Hello(router_id="slow", protocol_revision=PROTOCOL_REVISION)
        await call.write(pb.AttachRequest(hello=hello))
        for seq, first in enumerate([HOLD, FLOOD], start=1):
            submit = pb.Submit(seq=seq, tenant="t", token_ids=[first], max_tokens=500)
            submit.sampling.seed = 1
            await call.write(pb.AttachRequest(submit=submit))
            await router.until(lambda: router.last_status.running > 0)
        assert (await router.generate([ECHO])).reason == LENGTH
        await router.until(lambda: router.last_status.running == 0)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in call:
                pass
        assert isinstance(from_rpc(ended.value), SlowReader)
        assert (await router.generate([ECHO])).reason == LENGTH


async def test_drain_waits_for_what_runs_and_refuses_the_rest(model):
    async with attached_worker(model) as (_, channel, router):
        running = await router.submit([ECHO], max_tokens=100)
        await router.until(lambda: bool(router.tokens[running]))
        answer = await WorkerAdminServiceStub(channel).Drain(admin_pb.DrainRequest(), timeout=30)
        assert answer.aborted == 0
        await router.until(lambda: running in router.finished)
        assert router.finished[running].reason == LENGTH
        refused = await router.generate([ECHO])
        assert isinstance(from_status(refused.error), Draining)
        assert router.last_status.draining


async def test_drain_aborts_what_outlasts_the_grace(model):
    async with attached_worker(model) as (_, channel, router):
        held = [await router.submit([HOLD]) for _ in range(2)]
        await router.until(lambda: router.last_status.running == 2)
        request = admin_pb.DrainRequest(grace=duration_pb2.Duration(nanos=100_000_000))
        answer = await WorkerAdminServiceStub(channel).Drain(request, timeout=30)
        assert answer.aborted == 2
        await router.until(lambda: len(router.finished) == 2)
        assert all(isinstance(from_status(router.finished[s].error), Draining) for s in held)
        await router.until(lambda: router.last_status.running == 0)


async def test_nothing_is_left_in_shared_memory_not_even_of_killed_workers(model, tmp_path):
    options = [f"--local-dir={tmp_path}"]
    starting = tmp_path / "starting.lock"
    with worker_process(model, *options) as killed:
        (lock,) = set(tmp_path.iterdir()) - {starting}
        left = tmp_path / f"{lock.stem}.new.1"
        left.write_bytes(b"x")
        killed.process.kill()
    assert left.exists()
    with worker_process(model, *options) as worker:
        (own,) = set(tmp_path.iterdir()) - {starting}
        assert own != lock
        with worker_process(model, *options) as neighbour:
            assert own.exists(), "a living worker's files are not leftovers"
            neighbour.process.send_signal(signal.SIGTERM)
            assert await exit_code(neighbour) == 0
        worker.process.send_signal(signal.SIGTERM)
        assert await exit_code(worker) == 0
    assert list(tmp_path.iterdir()) == [starting]


def test_a_directory_without_a_model_is_named(tmp_path):
    with (
        pytest.raises(AssertionError, match=r"config\.json"),
        worker_process(tmp_path, module="lorry.worker"),
    ):
        pass


def test_a_directory_that_cannot_hold_images_is_named(model):
    with (
        pytest.raises(AssertionError, match="directory /dev/null/none cannot be made"),
        worker_process(model, "--local-dir=/dev/null/none"),
    ):
        pass


def test_the_front_loads_no_torch():
    code = "import sys; import lorry.worker.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
