"""The front between streams and engine, without either's process."""

import asyncio
from typing import Any

import pytest

from lorry.rpc.errors import (
    Draining,
    InvalidRequest,
    LorryError,
    NoWorker,
    QueueFull,
    SlowReader,
    Superseded,
    WorkerLost,
)
from lorry.worker import streams
from lorry.worker.front import MAX_ROUTERS, Front
from lorry.worker.messages import (
    NOT_ASKED,
    Cancel,
    Command,
    Failure,
    FetchImage,
    Finished,
    FinishReason,
    PinAdapter,
    Prefetch,
    ReleaseImage,
    ResidencyChange,
    Started,
    Status,
    StepTokens,
    Submit,
    TokenLogprobs,
)
from lorry.worker.responses import to_step
from lorry.worker.streams import (
    ResidencyUpdate,
    RouterStream,
    StepOutput,
    WorkerState,
    merge_wanted,
)

A, B, C, D = (bytes([letter]) * 32 for letter in b"abcd")


class Link:
    """A front, the commands that it has sent and the images that it has asked for."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.fetched: list[bytes] = []
        self.released: list[bytes] = []
        self.front = Front(self.commands.append, self, window=3)
        self.front.handle([Started(100, 4, 32, 64, 512)])

    def fetch(self, version: bytes) -> None:
        self.fetched.append(version)

    def release(self, version: bytes) -> None:
        self.released.append(version)

    def submit(self, stream: RouterStream, seq: int) -> int:
        """Submit; returns the engine's number of the request."""
        self.front.submit(stream, seq, submission)
        return stream.active[seq]

    def sent(self, cls):
        return [command for command in self.commands if isinstance(command, cls)]


@pytest.fixture
def link():
    return Link()


def submission(number: int) -> Submit:
    return Submit(number, "t", b"", [5], 0, 10, 0, [], 0.0, 1, None)


def end(number: int, reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished(number, reason, 1, 2)


def unread(stream: RouterStream) -> list[Any]:
    """What the router has still to read."""
    events = list(stream._unread)
    stream._unread.clear()
    return [event for event in events if not isinstance(event, ResidencyUpdate)]


async def read_all(stream: RouterStream):
    return [event async for event in stream.events()]


def test_a_steps_tokens_and_ends_leave_together_for_each_router(link):
    one, two = link.front.attach("one"), link.front.attach("two")
    first, second, other = link.submit(one, 1), link.submit(one, 2), link.submit(two, 1)
    link.front.handle([StepTokens(7, [other, first, second], [70, 71, 72]), end(first)])
    (output,) = unread(one)
    assert (output.step, output.seqs, output.token_ids) == (7, [1, 2], [71, 72])
    assert [e.seq for e in output.finished] == [1]
    (output,) = unread(two)
    assert (output.seqs, output.token_ids, output.finished) == ([1], [70], [])


def test_logprobs_go_to_the_routers_whose_requests_asked(link):
    one, two = link.front.attach("one"), link.front.attach("two")
    first, second, third = (link.submit(one, seq) for seq in (1, 2, 3))
    other = link.submit(two, 1)
    logprobs = TokenLogprobs(
        [0.0, 0.0, -0.5, -1.5, 0.0],
        [NOT_ASKED, NOT_ASKED, 2, 0, NOT_ASKED],
        [8, 9],
        [-0.5, -0.75],
    )
    requests = [other, first, second, third, first]
    link.front.handle([StepTokens(7, requests, [70, 71, 8, 73, 74], logprobs)])
    (output,) = unread(two)
    assert not to_step(output).logprobs
    (output,) = unread(one)
    step = to_step(output)
    assert list(step.seqs) == [1, 2, 3, 1]
    assert list(step.logprobs) == [0, -0.5, -1.5, 0]
    assert list(step.top_counts) == [0, 2, 0, 0]
    assert list(step.top_token_ids) == [8, 9]
    assert list(step.top_logprobs) == [-0.5, -0.75]


def test_steps_without_alternatives_have_no_counts_of_them(link):
    stream = link.front.attach("r")
    number = link.submit(stream, 1)
    link.front.handle([StepTokens(7, [number], [9], TokenLogprobs([-2.0], [0], [], []))])
    step = to_step(unread(stream)[0])
    assert (list(step.logprobs), list(step.top_counts)) == ([-2.0], [])


def test_ends_that_precede_a_steps_tokens_leave_with_them(link):
    stream = link.front.attach("r")
    first, second = link.submit(stream, 1), link.submit(stream, 2)
    cancelled = end(first, FinishReason.CANCELLED)
    link.front.handle([cancelled, StepTokens(4, [second], [9])])
    (output,) = unread(stream)
    assert (output.step, output.seqs, [e.seq for e in output.finished]) == (4, [2], [1])


def test_two_steps_in_one_message_stay_two_outputs(link):
    stream = link.front.attach("r")
    number = link.submit(stream, 1)
    link.front.handle([StepTokens(4, [number], [8]), StepTokens(5, [number], [9]), end(number)])
    four, five = unread(stream)
    assert (four.step, four.token_ids, four.finished) == (4, [8], [])
    assert (five.step, five.token_ids, len(five.finished)) == (5, [9], 1)


def test_a_failure_becomes_its_error(link):
    stream = link.front.attach("r")
    number = link.submit(stream, 1)
    failure = Failure("STORE_FULL", "no room", {"bytes": "9"})
    link.front.handle([Finished(number, FinishReason.ABORTED, 1, 0, failure)])
    ((ended,),) = [output.finished for output in unread(stream)]
    assert ended.error.reason == "STORE_FULL"
    assert (str(ended.error), ended.error.metadata) == ("no room", {"bytes": "9"})


def test_what_the_engine_says_of_a_left_routers_request_is_dropped(link):
    stream = link.front.attach("r")
    number = link.submit(stream, 1)
    link.front.detach(stream)
    assert link.sent(Cancel) == [Cancel([number])]
    link.front.handle([StepTokens(1, [number], [9]), end(number, FinishReason.CANCELLED)])
    assert not unread(stream)


def test_numbers_are_never_used_twice(link):
    one, two = link.front.attach("one"), link.front.attach("two")
    numbers = [link.submit(stream, seq) for seq in (1, 2) for stream in (one, two)]
    link.front.detach(one)
    numbers.append(link.submit(link.front.attach("one"), 1))
    assert len(set(numbers)) == 5


def test_a_submission_that_cannot_be_built_reaches_no_engine(link):
    def fail(number):
        raise InvalidRequest.of("max_tokens", "is bad")

    stream = link.front.attach("r")
    link.front.submit(stream, 1, fail)
    assert not link.commands
    (output,) = unread(stream)
    assert output.submit_limit == 4
    assert isinstance(output.finished[0].error, InvalidRequest)


def test_wishes_are_taken_in_turn_and_each_version_once(link):
    one, two = link.front.attach("one"), link.front.attach("two")
    link.front.prefetch(one, [A, B, C])
    link.front.prefetch(two, [D, A])
    assert link.sent(Prefetch)[-1] == Prefetch([A, D, B, C])


def test_a_prefetch_replaces_the_routers_last_one_and_no_other_routers(link):
    one, two = link.front.attach("one"), link.front.attach("two")
    link.front.prefetch(one, [A])
    link.front.prefetch(two, [B])
    link.front.prefetch(one, [C])
    assert link.sent(Prefetch)[-1] == Prefetch([C, B])


def test_a_left_router_wants_nothing(link):
    stream = link.front.attach("r")
    link.front.prefetch(stream, [A])
    link.front.detach(stream)
    assert link.sent(Prefetch) == [Prefetch([A]), Prefetch([])]


def test_the_same_wishes_are_not_repeated_to_the_engine(link):
    stream = link.front.attach("r")
    link.front.prefetch(stream, [A, B])
    link.front.prefetch(stream, [A, B])
    assert link.sent(Prefetch) == [Prefetch([A, B])]


def test_no_router_pushes_another_out_of_a_full_prefetch():
    greedy = [bytes([1, n]) for n in range(200)]
    assert merge_wanted([greedy, [A]], 10)[1] == A
    assert len(merge_wanted([greedy, [A]], 10)) == 10


def test_a_new_router_gets_a_snapshot_and_then_changes(link):
    link.front.handle([ResidencyChange([A], [], [A, B], [])])
    stream = link.front.attach("r")
    link.front.handle([ResidencyChange([], [A], [C], [B])])
    snapshot, change = stream._unread
    assert snapshot.snapshot
    assert (set(snapshot.gpu_added), set(snapshot.host_added)) == ({A}, {A, B})
    assert not change.snapshot
    assert (change.gpu_removed, change.host_added, change.host_removed) == ([A], [C], [B])
    assert set(link.front.residency.host_added) == {A, C}
    assert not link.front.residency.gpu_added


def test_fetches_and_releases_reach_the_images(link):
    link.front.handle([FetchImage(A), ReleaseImage(B)])
    assert (link.fetched, link.released) == ([A], [B])


def test_the_heartbeat_is_the_engines_last_status(link):
    stream = link.front.attach("r")
    link.front.beat()
    link.front.handle([Status(running=3)])
    link.front.beat()
    first, second = unread(stream)
    assert (first.engine.pages_total, first.engine.running) == (100, 0)
    assert second == WorkerState(Status(running=3), draining=False)


def test_only_so_many_routers_may_attach(link):
    for number in range(MAX_ROUTERS):
        link.front.attach(f"r-{number}")
    link.front.attach("r-0")  # the same one again
    with pytest.raises(QueueFull):
        link.front.attach("one more")


async def test_a_router_that_leaves_too_much_unread_loses_its_stream(link, monkeypatch):
    monkeypatch.setattr(streams, "MAX_UNREAD_BYTES", 1000)
    slow, quick = link.front.attach("slow"), link.front.attach("quick")
    number, other = link.submit(slow, 1), link.submit(quick, 1)
    for step in range(100):
        link.front.handle([StepTokens(step, [number, other], [8, 9])])
        if quick.is_open:
            unread(quick)
            quick._unread_bytes = 0
    assert link.sent(Cancel) == [Cancel([number])]
    with pytest.raises(SlowReader):
        await read_all(slow)
    assert quick.is_open


async def test_the_reader_of_an_ended_stream_still_gets_what_was_sent(link):
    stream = link.front.attach("r")
    link.submit(stream, 1)
    link.front.beat()
    link.front.attach("r")
    events = stream.events()
    assert isinstance(await anext(events), ResidencyUpdate)
    assert isinstance(await anext(events), WorkerState)
    with pytest.raises(Superseded):
        await anext(events)


async def test_draining_is_over_when_the_engine_is_done_with_every_request(link):
    stream = link.front.attach("r")
    number = link.submit(stream, 1)
    draining = asyncio.create_task(link.front.drain(None))
    await asyncio.sleep(0)
    link.front.submit(stream, 2, submission)
    (_, refused) = unread(stream)
    assert isinstance(refused.finished[0].error, Draining)
    assert not draining.done()
    link.front.handle([end(number)])
    assert await draining == 0


async def test_a_request_is_aborted_once_although_the_engine_also_ends_it(link):
    stream = link.front.attach("r")
    number = link.submit(stream, 1)
    assert await link.front.drain(0.0) == 1
    link.front.handle([StepTokens(1, [number], [9]), end(number, FinishReason.CANCELLED)])
    outputs = [event for event in unread(stream) if isinstance(event, StepOutput)]
    assert [[e.seq for e in output.finished] for output in outputs] == [[1]]
    assert link.sent(Cancel) == [Cancel([number])]
    assert await link.front.drain(None) == 0


async def test_a_lost_engine_ends_streams_calls_and_new_callers(link):
    stream = link.front.attach("r")
    link.submit(stream, 1)
    pin = asyncio.create_task(link.front.pin(A))
    await asyncio.sleep(0)
    assert link.sent(PinAdapter) == [PinAdapter(1, A)]
    link.front.lose_engine("it crashed")
    with pytest.raises(WorkerLost, match="it crashed"):
        await read_all(stream)
    with pytest.raises(WorkerLost):
        await pin
    with pytest.raises(WorkerLost):
        link.front.require_engine()
    assert await link.front.drain(None) == 0


def test_before_the_engine_has_started_there_is_no_worker():
    front = Front(lambda command: None, Link(), window=1)
    with pytest.raises(NoWorker):
        front.require_engine()


def test_an_unknown_failure_is_an_internal_error(link):
    stream = link.front.attach("r")
    number = link.submit(stream, 1)
    link.front.handle([Finished(number, FinishReason.ABORTED, 1, 0, Failure("ODD", "?"))])
    ((ended,),) = [output.finished for output in unread(stream)]
    assert type(ended.error) is LorryError
