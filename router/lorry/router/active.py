"""The requests that have not ended, and every way in which they end.

Each ends exactly once, whoever is first: its worker, its client, its deadline or the router. What
it holds is freed then, before its client hears of it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorry.router.counts import RequestCounts
from lorry.router.dispatcher import Dispatcher, Place
from lorry.router.generation import Completion, FinishReason
from lorry.router.output import Output
from lorry.router.request import Request, RequestState
from lorry.router.slo_counts import SloCounts
from lorry.router.worker_messages import Ended
from lorry.rpc.errors import DeadlineExpired, Interrupted, LorryError, WorkerLost

S = RequestState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    """What belongs to a request until it ends."""

    output: Output
    deadline: asyncio.TimerHandle


class ActiveRequests:
    """`when_ended` hears of each end, with the place at a worker that must be cancelled."""

    def __init__(self, dispatcher: Dispatcher, slo_counts: SloCounts) -> None:
        self.counts = RequestCounts()
        self.slo_counts = slo_counts
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._held: dict[Request, _Held] = {}
        self._none = asyncio.Event()
        self._none.set()
        self.when_ended: Callable[[Place | None], None] = lambda place: None

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Request]:
        """Over a copy: requests may end meanwhile."""
        return iter(list(self._held))

    def output(self, request: Request) -> Output:
        return self._held[request].output

    def add(self, request: Request, output: Output) -> None:
        """Take a request that the dispatcher has received."""
        deadline = self._loop.call_at(request.deadline_s, self.expire, request)
        self._held[request] = _Held(output, deadline)
        self._none.clear()

    async def none_left(self) -> None:
        await self._none.wait()

    def end(self, request: Request, state: RequestState, error: LorryError | None = None) -> None:
        """Free everything. Does nothing if the request has ended."""
        held = self._held.pop(request, None)
        if held is None:
            return
        held.deadline.cancel()
        place = self._dispatcher.end(request, state)
        self.counts.end(state, error)
        self.slo_counts.end(request, state)
        if not self._held:
            self._none.set()
        log.debug("%s %s", state.name, request.generation)
        self.when_ended(place)

    def complete(self, request: Request, last_word: Ended | None) -> None:
        """End well; without a last word what only the worker knows is missing."""
        output = self.output(request)
        output.flush()
        completion = _completion(request, output.matched_stop, last_word)
        self.end(request, S.FINISHED)
        output.complete(completion)

    def fail(self, request: Request, error: LorryError) -> None:
        output = self.output(request)
        self.end(request, S.FAILED, error)
        output.fail(error)

    def cut_off(self, request: Request, cls: type[WorkerLost | Interrupted]) -> None:
        """End in mid-stream: the client must not just try again."""
        num_sent = self.output(request).num_sent
        message = f"the output was cut off after {num_sent} tokens"
        self.fail(request, cls(message, sentTokens=num_sent))

    def give_up(
        self, request: Request, error: LorryError, cls: type[WorkerLost | Interrupted]
    ) -> None:
        """End with `error`, which lets the client try again, only if it has received nothing."""
        if self.output(request).has_sent:
            self.cut_off(request, cls)
        else:
            self.fail(request, error)

    def expire(self, request: Request) -> None:
        """Its deadline has passed. Does nothing if the request has ended."""
        if request.ended:
            return
        waited_s = self._loop.time() - request.arrival_s
        self.fail(
            request,
            DeadlineExpired(
                f"the deadline passed after {waited_s:.3f} s, in state {request.state.name}",
                state=request.state.name,
                waitedS=f"{waited_s:.3f}",
            ),
        )


def _completion(request: Request, stop_string: str | None, last_word: Ended | None) -> Completion:
    by_token = request.ended_by_token and stop_string is None
    said_stop = last_word is not None and last_word.reason is FinishReason.STOP
    stopped = by_token or stop_string is not None or said_stop
    assert request.submitted_s is not None
    return Completion(
        request_id=request.generation.request_id,
        reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        stop_string=stop_string,
        stop_token_id=request.output_ids[-1] if by_token else None,
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=len(request.output_ids),
        cached_tokens=last_word.cached_tokens if last_word else 0,
        adapter=request.generation.adapter,
        version=request.version,
        queue_s=request.submitted_s - request.arrival_s,
        adapter_load_s=last_word.adapter_load_s if last_word else 0.0,
        prefill_s=last_word.prefill_s if last_word else 0.0,
        ttft_s=request.first_token_s - request.arrival_s if request.first_token_s else 0.0,
    )
