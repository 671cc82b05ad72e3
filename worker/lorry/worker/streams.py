"""One router's stream: what it may submit, what of it is unfinished, and what it has yet to read.

Commands and events are independent: `send` never waits, and a router that leaves too much unread
loses its stream. Knows neither gRPC nor the engine.
"""

import asyncio
import collections
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from lorry.rpc.errors import InvalidRequest, LorryError, QueueFull, SlowReader
from lorry.worker.messages import FinishReason, RowLogprobs, Status, TokenLogprobs

MAX_UNREAD_BYTES = 16 << 20  # of the protocol
MAX_WANTED = 1024  # versions of one Prefetch that are looked at
ROW_BYTES = 8  # of a seq and a token id, about
LOGPROB_BYTES = 8  # of a logprob and a count or a token id, about
FINISHED_BYTES = 64
VERSION_BYTES = 34
STATUS_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnd:
    """How a Submit ended; `error` for ABORTED only."""

    seq: int
    reason: FinishReason
    error: LorryError | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    adapter_load_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(slots=True, eq=False)
class StepOutput:
    """What a step, or an event between steps, brought for one stream."""

    step: int
    seqs: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    # As long as seqs if any row has logprobs, but for the last rows that have none.
    logprobs: list[float] = field(default_factory=list)
    top_counts: list[int] = field(default_factory=list)
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)
    finished: list[RequestEnd] = field(default_factory=list)
    submit_limit: int = 0

    @property
    def num_bytes(self) -> int:
        rows = ROW_BYTES * (2 + len(self.seqs)) + FINISHED_BYTES * len(self.finished)
        return rows + LOGPROB_BYTES * (len(self.logprobs) + len(self.top_token_ids))

    def add_logprobs(self, row: RowLogprobs) -> None:
        """Of the newest row; rows before it without any get zeros."""
        missing = len(self.seqs) - 1 - len(self.logprobs)
        self.logprobs += [0.0] * missing + [row.logprob]
        self.top_counts += [0] * missing + [len(row.top_token_ids)]
        self.top_token_ids += row.top_token_ids
        self.top_logprobs += row.top_logprobs


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The heartbeat."""

    engine: Status
    draining: bool
    num_bytes: int = STATUS_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyUpdate:
    """Versions on the GPU and in host memory; a snapshot replaces what was known."""

    snapshot: bool
    gpu_added: Sequence[bytes]
    gpu_removed: Sequence[bytes] = ()
    host_added: Sequence[bytes]
    host_removed: Sequence[bytes] = ()

    @property
    def num_bytes(self) -> int:
        lists = (self.gpu_added, self.gpu_removed, self.host_added, self.host_removed)
        return VERSION_BYTES * (1 + sum(map(len, lists)))


@dataclass(frozen=True, slots=True)
class PromptReport:
    """Logprobs of prompt tokens of one request."""

    seq: int
    first_index: int
    logprobs: TokenLogprobs

    @property
    def num_bytes(self) -> int:
        rows = self.logprobs
        return ROW_BYTES + LOGPROB_BYTES * (len(rows.logprobs) + len(rows.top_token_ids))


StreamEvent = StepOutput | PromptReport | WorkerState | ResidencyUpdate


class RouterStream:
    """The worker's side of one Attach."""

    def __init__(self, router_id: str, *, window: int) -> None:
        """`window` is how many Submits may be unfinished."""
        self.router_id = router_id
        self.active: dict[int, int] = {}  # seq to the request's number
        self.wanted: list[bytes] = []  # versions, most urgent first
        self.is_open = True
        self._window = window
        self._num_submitted = 0
        self._num_finished = 0
        self._unread: collections.deque[StreamEvent] = collections.deque()
        self._unread_bytes = 0
        self._error: LorryError | None = None
        self._changed = asyncio.Event()

    @property
    def submit_limit(self) -> int:
        """Submits that may have been sent since Hello."""
        return self._window + self._num_finished

    def count_submit(self, seq: int) -> None:
        """Raises InvalidRequest if `seq` is not the next."""
        if seq != self._num_submitted + 1:
            raise InvalidRequest.of("submit.seq", f"must be {self._num_submitted + 1}, got {seq}")
        self._num_submitted = seq

    def check_limit(self) -> None:
        """Raises QueueFull if more was submitted than may be."""
        if self._num_submitted > self.submit_limit:
            raise QueueFull(
                f"submit {self._num_submitted} is beyond the submit_limit {self.submit_limit}",
                submitLimit=self.submit_limit,
            )

    def finish(self, output: StepOutput, end: RequestEnd) -> None:
        """Add a request's end to `output`, which is yet to be sent."""
        self.active.pop(end.seq, None)
        self._num_finished += 1
        output.finished.append(end)
        output.submit_limit = self.submit_limit

    def send(self, event: StreamEvent) -> None:
        """Queue an event; ends the stream instead if too much is unread."""
        if not self.is_open:
            return
        if self._unread_bytes + event.num_bytes > MAX_UNREAD_BYTES:
            unread = self._unread_bytes
            self._unread.clear()
            self.end(SlowReader(f"{unread} bytes are unread", unreadBytes=unread))
            return
        self._unread.append(event)
        self._unread_bytes += event.num_bytes
        self._changed.set()

    def end(self, error: LorryError | None = None) -> None:
        """Take and send no more; the reader still gets what was sent, then `error`."""
        if self.is_open:
            self.is_open = False
            self._error = error
            self._changed.set()

    async def events(self) -> AsyncIterator[StreamEvent]:
        """What was sent, until the stream ends; raises what it ended with."""
        while True:
            while self._unread:
                event = self._unread.popleft()
                self._unread_bytes -= event.num_bytes
                yield event
            if not self.is_open:
                break
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error


def merge_wanted(wanted: Iterable[Sequence[bytes]], limit: int) -> list[bytes]:
    """The routers' wishes in turn: the first of each, then the second of each, and so on."""
    return list(dict.fromkeys(_in_turn(wanted)))[:limit]


def _in_turn(wanted: Iterable[Sequence[bytes]]) -> Iterator[bytes]:
    for turn in zip_longest(*wanted):
        yield from (version for version in turn if version is not None)
