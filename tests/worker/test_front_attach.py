"""The worker's front as a process, with an engine that computes nothing."""

import itertools
from math import nan

import grpc.aio
import pytest

from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import (
    ContextLengthExceeded,
    FeatureUnsupported,
    InvalidRequest,
    LorryError,
    ModelMismatch,
    NoWorker,
    PoolTooSmall,
    QueueFull,
    StoreUnavailable,
    Superseded,
)
from lorry.rpc.status import from_status
from lorry.v1 import common_pb2
from lorry.v1 import worker_service_pb2 as pb
from tests.support.attached_router import attached_router, until_ready, worker_stub
from tests.support.byte_model import write_byte_model
from tests.support.scripted_engine import ECHO, FAIL, HOLD
from tests.support.worker_process import worker_process

WINDOW = 6
router_ids = (f"router-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def worker(model):
    options = ["--max-running=4", "--max-waiting=2", "--worker-id=w-1", "--store=127.0.0.1:1"]
    with worker_process(model, *options, "--fetch-timeout-s=0.2") as worker:
        yield worker


@pytest.fixture
async def channel(worker):
    async with grpc.aio.insecure_channel(worker.address) as channel:
        await until_ready(channel)
        yield channel


@pytest.fixture
async def router(channel):
    async with attached_router(channel, next(router_ids)) as router:
        yield router


def error_of(finished: pb.Finished) -> LorryError:
    assert finished.reason == common_pb2.FINISH_REASON_ABORTED
    return from_status(finished.error)


async def test_the_welcome_tells_what_the_worker_is(router, model):
    assert router.welcome.worker_id == "w-1"
    assert router.welcome.model_digest == read_base_model(model).digest
    assert (router.welcome.max_context_tokens, router.welcome.max_rank) == (512, 256)
    assert router.welcome.submit_limit == WINDOW
    assert (router.welcome.max_running, router.welcome.step_tokens) == (4, 32)
    assert router.welcome.status.pages_total == 100


async def test_a_request_gets_its_tokens_and_one_end(router):
    finished = await router.generate([ECHO, 21, 22, 23], max_tokens=3)
    assert router.tokens[1] == [ECHO, 21, 22]
    assert finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert finished.usage == common_pb2.Usage(prompt_tokens=4, completion_tokens=3)
    assert finished.adapter_load.ToMilliseconds() == 500
    assert finished.prefill.ToMilliseconds() == 250


async def test_a_step_is_one_message_whatever_it_holds(router):
    seqs = [await router.submit([ECHO, 21], max_tokens=20) for _ in range(4)]
    await router.until(lambda: len(router.finished) == 4)
    numbers = [step.step for step in router.steps if step.seqs]
    assert len(numbers) == len(set(numbers))
    assert any(set(step.seqs) == set(seqs) for step in router.steps)


async def test_a_resumed_request_is_not_sent_what_it_has(router):
    finished = await router.generate([ECHO, 21, 22, 23], generated_tokens=2, max_tokens=4)
    assert router.tokens[1] == [22, 23]
    assert finished.usage == common_pb2.Usage(prompt_tokens=2, completion_tokens=4)


async def test_the_engines_failure_ends_only_its_request(router):
    error = error_of(await router.generate([FAIL]))
    assert isinstance(error, PoolTooSmall)
    assert error.metadata == {"pages": "5"}
    assert (await router.generate([ECHO])).reason == common_pb2.FINISH_REASON_LENGTH


async def test_a_cancelled_request_ends_once(router):
    seq = await router.submit([HOLD])
    await router.cancel(seq, 77)
    await router.until(lambda: seq in router.finished)
    assert router.finished[seq].reason == common_pb2.FINISH_REASON_CANCELLED


async def test_a_submit_beyond_the_limit_is_refused_and_the_others_run_on(router):
    held = [await router.submit([HOLD]) for _ in range(WINDOW)]
    assert isinstance(error_of(await router.generate([ECHO])), QueueFull)
    await router.cancel(*held)
    await router.until(lambda: len(router.finished) == WINDOW + 1)
    assert router.submit_limit == 2 * WINDOW + 1
    assert (await router.generate([ECHO])).reason == common_pb2.FINISH_REASON_LENGTH


async def test_the_limit_rises_with_every_end(router):
    for finished in range(1, 5):
        await router.generate([ECHO])
        assert router.submit_limit == WINDOW + finished


async def test_each_router_has_its_own_limit(router, channel):
    for _ in range(WINDOW):
        await router.submit([HOLD])
    async with attached_router(channel, next(router_ids)) as other:
        assert other.submit_limit == WINDOW
        assert (await other.generate([ECHO])).reason == common_pb2.FINISH_REASON_LENGTH


REPETITION, PRESENCE = "sampling.repetition_penalty", "sampling.presence_penalty"
FREQUENCY, BIAS = "sampling.frequency_penalty", "sampling.logit_bias"
MANY_BIASES = dict.fromkeys(range(301), 1)


@pytest.mark.parametrize(
    ("fields", "expected", "named"),
    [
        ({"token_ids": []}, InvalidRequest, "token_ids"),
        ({"token_ids": [9999]}, InvalidRequest, "token_ids"),
        ({"generated_tokens": 1}, InvalidRequest, "token_ids"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"min_tokens": 9}, InvalidRequest, "min_tokens"),
        ({"stop_token_ids": [2**32 - 1]}, InvalidRequest, "stop_token_ids"),
        ({"stop_token_ids": [1] * 129}, InvalidRequest, "stop_token_ids"),
        ({"version": b"short"}, InvalidRequest, "version"),
        ({"max_tokens": 600}, ContextLengthExceeded, "max_tokens"),
        ({"sampling": {"temperature": 0.5}}, InvalidRequest, "sampling.seed"),
        ({"sampling": {"temperature": -1, "seed": 1}}, InvalidRequest, "sampling.temperature"),
        ({"sampling": {"top_p": 1.5, "seed": 1}}, InvalidRequest, "sampling.top_p"),
        ({"sampling": {"top_p": 0, "seed": 1}}, InvalidRequest, "sampling.top_p"),
        ({"sampling": {"min_p": -0.5, "seed": 1}}, InvalidRequest, "sampling.min_p"),
        ({"response": {"top_logprobs": 21}}, InvalidRequest, "response.top_logprobs"),
        ({"response": {"prompt_logprobs": 21}}, InvalidRequest, "response.prompt_logprobs"),
        ({"sampling": {"repetition_penalty": 0, "seed": 1}}, InvalidRequest, REPETITION),
        ({"sampling": {"repetition_penalty": nan, "seed": 1}}, InvalidRequest, REPETITION),
        ({"sampling": {"presence_penalty": 3, "seed": 1}}, InvalidRequest, PRESENCE),
        ({"sampling": {"frequency_penalty": -3, "seed": 1}}, InvalidRequest, FREQUENCY),
        ({"sampling": {"logit_bias": {9999: 1}, "seed": 1}}, InvalidRequest, BIAS),
        ({"sampling": {"logit_bias": {5: 101}, "seed": 1}}, InvalidRequest, BIAS),
        ({"sampling": {"logit_bias": MANY_BIASES, "seed": 1}}, InvalidRequest, BIAS),
        ({"guided": {"regex": "a"}}, FeatureUnsupported, "guided"),
    ],
)
async def test_a_bad_submit_is_refused_by_field_and_harms_no_other(router, fields, expected, named):
    fields = {"token_ids": [ECHO]} | fields
    error = error_of(await router.generate(**fields))
    assert isinstance(error, expected)
    assert named in [v.field for v in error.violations] + [error.metadata.get("field")]
    assert (await router.generate([ECHO])).reason == common_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("num_top", [0, 2])
async def test_logprobs_of_a_prompt_reach_the_router_before_its_tokens(router, num_top):
    response = {"prompt_logprobs": num_top}
    asking = await router.submit([ECHO, 30, 31], response=response)
    other = await router.submit([ECHO, 30, 31])
    await router.until(lambda: {asking, other} <= router.finished.keys())
    assert [(chunk.seq, chunk.first_index) for chunk in router.prompt_chunks] == [
        (asking, 1),
        (asking, 2),
    ]
    rows = [chunk.logprobs for chunk in router.prompt_chunks]
    assert [list(row.logprobs) for row in rows] == [[-1], [-2]]
    assert [list(row.top_counts) for row in rows] == [[num_top] if num_top else []] * 2
    assert [list(row.top_token_ids) for row in rows] == [list(range(num_top))] * 2
    assert len(router.tokens[asking]) == 3


async def test_a_version_that_no_store_can_deliver_fails_its_request_only(router):
    seq = await router.submit([ECHO], version=b"v" * 32)
    assert (await router.generate([ECHO])).reason == common_pb2.FINISH_REASON_LENGTH
    await router.until(lambda: seq in router.finished)
    assert isinstance(error_of(router.finished[seq]), StoreUnavailable)


async def test_a_gap_in_the_seqs_ends_the_stream(router):
    await router.submit([ECHO], seq=5)
    assert isinstance(await router.until_ended(), InvalidRequest)


async def test_a_new_hello_supersedes_the_old_stream_and_cancels_its_requests(channel):
    router_id = next(router_ids)
    async with attached_router(channel, router_id) as old:
        await old.submit([HOLD])
        async with attached_router(channel, router_id) as new:
            assert isinstance(await old.until_ended(), Superseded)
            await new.until(lambda: new.last_status.running == 0)
            assert (await new.generate([ECHO])).seq == 1


@pytest.mark.parametrize("ending", ["cancel", "half-close"])
async def test_the_end_of_a_stream_cancels_its_requests(channel, ending):
    async with attached_router(channel, next(router_ids)) as watcher:
        async with attached_router(channel, next(router_ids)) as leaver:
            await leaver.submit([HOLD])
            await watcher.until(lambda: watcher.last_status.running == 1)
            if ending == "half-close":
                await leaver.half_close()
                assert await leaver.until_ended() is None
        await watcher.until(lambda: watcher.last_status.running == 0)


@pytest.mark.parametrize(
    ("hello", "expected"),
    [
        ({"model_digest": b"another"}, ModelMismatch),
        ({"protocol_revision": 99}, ModelMismatch),
        ({"router_id": "x" * 129}, InvalidRequest),
    ],
)
async def test_a_hello_that_does_not_match_is_refused(channel, hello, expected):
    hello = {"router_id": next(router_ids), "welcomed": False} | hello
    async with attached_router(channel, **hello) as router:
        assert isinstance(await router.until_ended(), expected)


async def test_a_stream_must_begin_with_hello(channel):
    call = worker_stub(channel).Attach()
    await call.write(pb.AttachRequest(cancel=pb.Cancel(seqs=[1])))
    with pytest.raises(grpc.aio.AioRpcError, match="hello"):
        await call.read()


async def test_the_heartbeat_comes_also_when_idle_and_describes_the_engine(router):
    await router.until(lambda: len(router.statuses) >= 2)
    status = router.statuses[-1]
    assert [(point.rows, point.ms) for point in status.step_times] == [(1, 1.0), (4, 2.0)]
    assert (status.max_adapters_in_step, status.max_adapters_beside_base_in_step) == (3, 2)
    assert not status.draining


async def test_residency_begins_with_a_snapshot(router):
    await router.until(lambda: bool(router.residencies))
    assert router.residencies[0].snapshot


async def test_the_status_needs_no_stream(channel, router):
    status = await worker_stub(channel).GetWorkerStatus(pb.GetWorkerStatusRequest())
    assert status.worker_id == "w-1"
    assert status.epoch == router.welcome.epoch
    assert status.status.pages_total == 100
    assert status.residency.snapshot


async def test_before_the_engine_is_ready_there_is_no_worker(model):
    with worker_process(model, SCRIPTED_ENGINE="never-ready") as worker:
        async with (
            grpc.aio.insecure_channel(worker.address) as channel,
            attached_router(channel, "r", welcomed=False) as router,
        ):
            assert isinstance(await router.until_ended(), NoWorker)
