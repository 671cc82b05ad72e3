"""Workers that die, hang, drain and come and go under load: every output is as if they had not."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from demo import tasks
from lorry.client import Client, Request
from lorry.client.generation import Generation
from lorry.client.probe import readiness
from lorry.client.retry import RetryPolicy
from lorry.rpc.errors import DeadlineExpired, Draining, SlowReader, WorkerLost
from lorry.rpc.status import from_rpc
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.command import REPO, child_environment
from tests.support.fleet import Fleet, engine_of, resume, suspend
from tests.support.processes import Service
from tests.support.streams import outputs, streamed

ADAPTERS = ["reverse", "rot13", "double-letters"]
NUM_STREAMS = 24
NUM_TOKENS = 100
# What is sent ahead of a client that does not read is little.
UNREAD = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024),
]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), 3, "--client-stall-s", "3")
    try:
        await fleet.start()
        async with fleet.client() as client:
            for adapter in ADAPTERS:
                await client.adapters.push(REPO / "demo" / "adapters" / adapter)
        yield fleet
    finally:
        await fleet.stop()


def request(number: int, **fields: Any) -> Request:
    """Greedy or sampled, of the base model or an adapter: every number is another one."""
    words = ["lorry", "transport", "banana", "orchard", "keyboard"]
    sampled: dict[str, Any] = {"temperature": 1.2, "top_k": 30, "seed": number}
    defaults: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    defaults |= sampled if number % 2 else {"temperature": 0.0}
    return Request(
        prompt=tasks.make_prompt(words[number % len(words)]),
        adapter=["", *ADAPTERS][number // 2 % 4],
        **(defaults | fields),
    )


REQUESTS = [request(number) for number in range(NUM_STREAMS)]


async def drained(service: Service) -> None:
    """Return once the service says that it takes nothing new."""
    async for is_ready in readiness(service.address):
        if not is_ready:
            return


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(fleet: Fleet) -> list[list[int]]:
    expected = await outputs(fleet.client, REQUESTS)
    assert all(len(token_ids) == NUM_TOKENS for token_ids in expected)
    assert len({tuple(token_ids) for token_ids in expected}) > NUM_STREAMS // 2
    return expected


async def serves_again(fleet: Fleet, undisturbed: list[list[int]]) -> None:
    async with fleet.client() as client:
        assert await streamed(client, request(1)) == undisturbed[1]


@pytest.mark.parametrize("what", ["worker", "engine"])
async def test_streams_of_a_killed_worker_go_on_elsewhere_with_the_same_tokens(
    fleet: Fleet, undisturbed: list[list[int]], what: str
) -> None:
    killed = list[Service]()

    async def disturb() -> None:
        killed.append(await fleet.busiest())
        (killed[0] if what == "worker" else engine_of(killed[0])).kill()

    assert await outputs(fleet.client, REQUESTS, disturb) == undisturbed
    assert await killed[0].wait() != 0
    await fleet.restart(killed[0])


async def test_streams_survive_two_workers_after_another(
    fleet: Fleet, undisturbed: list[list[int]]
) -> None:
    killed = list[Service]()

    async def disturb() -> None:
        for _ in range(2):
            killed.append(await fleet.busiest())
            killed[-1].kill()
            await killed[-1].wait()
            await asyncio.sleep(0.2)

    assert await outputs(fleet.client, REQUESTS, disturb) == undisturbed
    for worker in killed:
        await worker.start(worker.address)
    await fleet.all_ready()


async def test_the_third_loss_ends_a_stream_with_the_number_of_its_tokens(fleet: Fleet) -> None:
    received, alive = list[int](), list(fleet.workers)
    fleet.list(alive[:1])  # one at a time, so that it is known where the stream is
    await fleet.attached(1)

    async def read(client: Client) -> None:
        async with client.stream(request(0, max_tokens=1000), timeout_s=120) as stream:
            async for chunk in stream:
                received.extend(chunk.token_ids)
                if alive and len(received) >= 20 * (4 - len(alive)):
                    fleet.list(alive[1:2] or alive)
                    alive.pop(0).kill()

    async with fleet.client() as client:
        with pytest.raises(WorkerLost) as failure:
            await read(client)
    assert not alive
    assert failure.value.metadata == {"sentTokens": str(len(received))}
    for worker in fleet.workers:
        await worker.wait()
        await worker.start(worker.address)
    fleet.list(fleet.workers)
    await fleet.all_ready()


async def test_a_drained_worker_finishes_what_it_runs(
    fleet: Fleet, undisturbed: list[list[int]]
) -> None:
    drained = list[Service]()

    async def disturb() -> None:
        drained.append(await fleet.busiest())
        drained[0].kill(signal.SIGTERM)

    assert await outputs(fleet.client, REQUESTS, disturb) == undisturbed
    assert await drained[0].wait() == 0
    await fleet.restart(drained[0])


@pytest.mark.parametrize("what", ["worker", "engine"])
async def test_a_worker_that_hangs_is_noticed(
    fleet: Fleet, undisturbed: list[list[int]], what: str
) -> None:
    hanging = list[Service]()

    async def disturb() -> None:
        worker = await fleet.busiest()
        hanging.append(worker)
        if what == "worker":
            suspend(worker)
        else:
            engine_of(worker).suspend()

    assert await outputs(fleet.client, REQUESTS, disturb) == undisturbed
    if what == "worker":
        resume(hanging[0])
        await fleet.all_ready()
        await serves_again(fleet, undisturbed)
    else:
        assert await hanging[0].wait() != 0
        await fleet.restart(hanging[0])


async def test_workers_come_and_go_with_their_name(
    fleet: Fleet, undisturbed: list[list[int]]
) -> None:
    first, second, third = fleet.workers

    async def disturb() -> None:
        for listed in ([first], [second, third], [third]):
            fleet.list(listed)
            await asyncio.sleep(0.3)

    assert await outputs(fleet.client, REQUESTS, disturb) == undisturbed
    await fleet.attached(1)
    fleet.list(fleet.workers)
    await fleet.all_ready()


async def test_a_client_that_is_killed_leaves_nothing_behind(
    fleet: Fleet, undisturbed: list[list[int]]
) -> None:
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        *["-m", "tests.support.streaming_client", fleet.router.address, "12"],
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    assert client.stdout is not None
    assert await asyncio.wait_for(client.stdout.readline(), 60) == b"streaming\n"
    client.kill()
    await client.wait()
    await fleet.idle()
    await serves_again(fleet, undisturbed)


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        """Nothing to do with it."""


async def test_a_client_that_stops_reading_is_given_up_and_delays_nobody(
    fleet: Fleet, undisturbed: list[list[int]]
) -> None:
    """Nothing of what it asked for fits into what gRPC sends ahead."""
    spec = request(0, max_tokens=1000, top_logprobs=20).to_proto()
    async with grpc.aio.insecure_channel(fleet.router.address, options=UNREAD) as channel:
        stub: Any = InferenceServiceStub(channel)
        call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec), timeout=120)
        await call.read()
        assert await outputs(fleet.client, REQUESTS) == undisturbed
        await fleet.idle()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await read_all(call)
    assert isinstance(from_rpc(failure.value), SlowReader)


async def test_deadlines_pass_in_the_queue_and_in_mid_stream(
    fleet: Fleet, undisturbed: list[list[int]]
) -> None:
    """The workers take as many as run, and the others wait."""
    async with fleet.client() as client:
        calls = [
            client.generate(request(number, max_tokens=1000), timeout_s=1.5)
            for number in range(3 * NUM_STREAMS)
        ]
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(end, DeadlineExpired) for end in ends) > NUM_STREAMS
    assert {type(end) for end in ends} <= {DeadlineExpired, Generation}
    await fleet.idle()
    await serves_again(fleet, undisturbed)


async def test_sigterm_to_the_router_lets_streams_finish_and_refuses_new_ones(
    fleet: Fleet, undisturbed: list[list[int]]
) -> None:
    async def disturb() -> None:
        fleet.router.kill(signal.SIGTERM)
        await drained(fleet.router)
        once = RetryPolicy(attempts=1)
        async with Client(router=fleet.router.address, retry=once) as client:
            with pytest.raises(Draining) as refusal:
                await client.generate(request(0))
        assert refusal.value.retry_after_s is not None

    assert await outputs(fleet.client, REQUESTS, disturb) == undisturbed
    assert await fleet.router.wait() == 0
    await fleet.router.start(fleet.router.address)
    await fleet.all_ready()
    await serves_again(fleet, undisturbed)
