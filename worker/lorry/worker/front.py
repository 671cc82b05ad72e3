"""Between the routers' streams and the engine.

Runs on one event loop and never waits for a router or for the engine. Every Submit ends in exactly
one end: the engine's, or one made here when it is refused or drained. If the engine is lost, the
streams end instead, so that routers may resubmit.
"""

import asyncio
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

import msgspec

from lorry.rpc.errors import Draining, LorryError, NoWorker, QueueFull, Superseded, WorkerLost
from lorry.worker.counts import RequestCounts
from lorry.worker.engine_calls import EngineCalls
from lorry.worker.messages import (
    AdminResult,
    Cancel,
    Command,
    Event,
    EvictAdapter,
    FetchImage,
    Finished,
    FinishReason,
    PinAdapter,
    Prefetch,
    PromptLogprobs,
    ReleaseImage,
    ResidencyChange,
    Started,
    Status,
    StepTokens,
    Submit,
    UnpinAdapter,
)
from lorry.worker.request_table import Place, RequestTable, StepOutputs
from lorry.worker.streams import (
    MAX_WANTED,
    PromptReport,
    RequestEnd,
    ResidencyUpdate,
    RouterStream,
    StepOutput,
    StreamEvent,
    WorkerState,
    merge_wanted,
)

MAX_ROUTERS = 64
MAX_PREFETCH = 256  # versions that the engine is told of


class Images(Protocol):
    """Fetches page images for the engine and answers it by ImageReady or ImageFailed."""

    def fetch(self, version: bytes) -> None: ...

    def release(self, version: bytes) -> None: ...


class Front:
    """All that this worker knows of its routers and of the engine's state."""

    def __init__(self, send: Callable[[Command], None], images: Images, *, window: int) -> None:
        """`send` reaches the engine; `window` is how many Submits of a router may be unfinished."""
        self.draining = False
        self.started = asyncio.Event()
        self.counts = RequestCounts()
        self._send_command = send
        self._images = images
        self._window = window
        self._calls = EngineCalls(send)
        self._requests = RequestTable()
        self._streams: dict[str, RouterStream] = {}
        self._prefetch: list[bytes] = []
        self._engine: Started | None = None
        self._lost: WorkerLost | None = None
        self._status = Status()
        self._step = 0
        self._gpu: set[bytes] = set()
        self._host: set[bytes] = set()

    # For all callers

    def require_engine(self) -> Started:
        """Raises NoWorker until the engine can take requests, WorkerLost once it is gone."""
        if self._lost is not None:
            raise self._lost
        if self._engine is None:
            raise NoWorker("the engine is still loading the model", retry_after_s=1.0)
        return self._engine

    @property
    def state(self) -> WorkerState:
        return WorkerState(self._status, self.draining)

    @property
    def num_routers(self) -> int:
        return len(self._streams)

    @property
    def num_requests(self) -> int:
        """Requests that the engine is not done with."""
        return len(self._requests)

    @property
    def num_adapters(self) -> dict[str, int]:
        """Versions by tier."""
        return {"gpu": len(self._gpu), "host": len(self._host)}

    @property
    def residency(self) -> ResidencyUpdate:
        return ResidencyUpdate(
            snapshot=True, gpu_added=list(self._gpu), host_added=list(self._host)
        )

    # For routers

    def attach(self, router_id: str) -> RouterStream:
        """A stream for the router, which begins with a snapshot; the one that it had ends."""
        if old := self._streams.get(router_id):
            self.detach(old, Superseded(f"router {router_id!r} has attached anew"))
        if len(self._streams) >= MAX_ROUTERS:
            raise QueueFull(f"{MAX_ROUTERS} routers are attached")
        stream = self._streams[router_id] = RouterStream(router_id, window=self._window)
        stream.send(self.residency)
        return stream

    def detach(self, stream: RouterStream, error: LorryError | None = None) -> None:
        """End a stream and cancel its requests; ending it twice changes nothing."""
        stream.end(error)
        if self._streams.get(stream.router_id) is stream:
            del self._streams[stream.router_id]
            self._update_prefetch()
        self._abandon(list(stream.active.values()))
        stream.active.clear()

    def submit(self, stream: RouterStream, seq: int, build: Callable[[int], Submit]) -> None:
        """Pass a request on under a number, or end it with what `build` raises."""
        stream.count_submit(seq)
        self.counts.received += 1
        number = self._requests.new_number()
        try:
            stream.check_limit()
            if self.draining:
                raise Draining("the worker is draining")
            command = build(number)
        except LorryError as error:
            self.counts.refuse(error)
            self._abort(Place(stream, seq), error)
            return
        self.counts.pass_on(command)
        self._requests.add(number, Place(stream, seq))
        self._send_command(command)

    def cancel(self, stream: RouterStream, seqs: Iterable[int]) -> None:
        """Unknown and finished seqs are ignored."""
        if numbers := [stream.active[seq] for seq in seqs if seq in stream.active]:
            self._send_command(Cancel(numbers))

    def prefetch(self, stream: RouterStream, versions: Iterable[bytes]) -> None:
        """Replace what the router wants next."""
        stream.wanted = list(islice(versions, MAX_WANTED))
        self._update_prefetch()

    # For operators

    async def pin(self, version: bytes) -> None:
        """Returns once the version is resident."""
        await self._calls.call(lambda call: PinAdapter(call, version))

    async def unpin(self, version: bytes) -> None:
        await self._calls.call(lambda call: UnpinAdapter(call, version))

    async def evict(self, version: bytes) -> None:
        await self._calls.call(lambda call: EvictAdapter(call, version))

    async def drain(self, grace_s: float | None) -> int:
        """Refuse Submits from now on and wait for what runs; returns how many were aborted."""
        self.draining = True
        self.beat()
        try:
            async with asyncio.timeout(grace_s):
                await self._requests.wait_idle()
        except TimeoutError:
            return self._abort_all(Draining("the worker stopped before the request was complete"))
        return 0

    # For the process

    def handle(self, events: list[Event]) -> None:
        """One message of the engine; ends that came with a step's tokens leave with them."""
        outputs = StepOutputs(self._step)
        for event in events:
            match event:
                case StepTokens(step):
                    if not outputs.move_to(step):
                        self._send_outputs(outputs)
                        outputs = StepOutputs(step)
                    self._step = step
                    self.counts.output_tokens += len(event.token_ids)
                    self._requests.distribute(event, outputs)
                case PromptLogprobs(number, first_index, logprobs):
                    if place := self._requests.place(number):
                        report = PromptReport(place.seq, first_index, logprobs)
                        self._send(place.stream, report)
                case Finished():
                    self.counts.end(event)
                    self._requests.finish(event, outputs)
                case FetchImage(version):
                    self._images.fetch(version)
                case ReleaseImage(version):
                    self._images.release(version)
                case ResidencyChange():
                    self._change_residency(event)
                case Status():
                    self._status = event
                case AdminResult():
                    self._calls.answer(event)
                case Started(pages_total):
                    self._engine = event
                    self.started.set()
                    self._status = Status(pages_total=pages_total, pages_free=pages_total)
        self._send_outputs(outputs)

    def beat(self) -> None:
        """Send every router the heartbeat."""
        for stream in list(self._streams.values()):
            self._send(stream, self.state)

    def end_streams(self) -> None:
        """End every stream; routers still get what was sent."""
        for stream in list(self._streams.values()):
            self.detach(stream)

    def lose_engine(self, reason: str) -> None:
        """End everything: there is no engine any more."""
        self._lost = WorkerLost(f"the worker's engine is gone: {reason}")
        self._requests.clear()
        self._calls.fail_all(self._lost)
        for stream in list(self._streams.values()):
            stream.active.clear()
            self.detach(stream, self._lost)

    def _send(self, stream: RouterStream, event: StreamEvent) -> None:
        stream.send(event)
        if not stream.is_open:
            self.detach(stream)

    def _send_outputs(self, outputs: StepOutputs) -> None:
        for stream, output in outputs.by_stream.items():
            self._send(stream, output)

    def _abort(self, place: Place, error: LorryError) -> None:
        """End a request for its router."""
        output = StepOutput(self._step)
        end = RequestEnd(seq=place.seq, reason=FinishReason.ABORTED, error=error)
        place.stream.finish(output, end)
        self._send(place.stream, output)

    def _abort_all(self, error: LorryError) -> int:
        places = self._requests.owned()
        self._abandon([place.stream.active[place.seq] for place in places])
        for place in places:
            self._abort(place, error)
        return len(places)

    def _abandon(self, numbers: list[int]) -> None:
        """Cancel requests in whose end no router is interested any more."""
        if numbers:
            self._requests.disown(numbers)
            self._send_command(Cancel(numbers))

    def _change_residency(self, change: ResidencyChange) -> None:
        self._gpu = (self._gpu - set(change.gpu_removed)) | set(change.gpu_added)
        self._host = (self._host - set(change.host_removed)) | set(change.host_added)
        update = ResidencyUpdate(snapshot=False, **msgspec.structs.asdict(change))
        for stream in list(self._streams.values()):
            self._send(stream, update)

    def _update_prefetch(self) -> None:
        """Tell the engine what all routers together want next, if that has changed."""
        wanted = (stream.wanted for stream in self._streams.values())
        merged = merge_wanted(wanted, MAX_PREFETCH)
        if merged != self._prefetch:
            self._prefetch = merged
            self._send_command(Prefetch(merged))
