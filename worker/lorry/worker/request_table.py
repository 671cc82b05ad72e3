"""Requests from their Submit until the engine is done with them, and whose they are."""

import asyncio
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from lorry.worker.failures import to_error
from lorry.worker.messages import Finished, StepTokens
from lorry.worker.streams import RequestEnd, RouterStream, StepOutput


class Place(NamedTuple):
    """A request as its router knows it."""

    stream: RouterStream
    seq: int


class StepOutputs:
    """What one step brought, by stream; made anew for each message of the engine."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.by_stream: dict[RouterStream, StepOutput] = {}

    def of(self, stream: RouterStream) -> StepOutput:
        output = self.by_stream.get(stream)
        if output is None:
            output = self.by_stream[stream] = StepOutput(self.step)
        return output

    def move_to(self, step: int) -> bool:
        """Become the outputs of `step`; False if they hold another one's tokens."""
        if step != self.step and any(output.seqs for output in self.by_stream.values()):
            return False
        self.step = step
        for output in self.by_stream.values():
            output.step = step
        return True


class RequestTable:
    """Finds a request's stream by the number that the engine knows it by."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._places: dict[int, Place | None] = {}  # None: over for its router
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        """Requests that the engine is not done with."""
        return len(self._places)

    def new_number(self) -> int:
        return next(self._numbers)

    def add(self, number: int, place: Place) -> None:
        place.stream.active[place.seq] = number
        self._places[number] = place
        self._idle.clear()

    def disown(self, numbers: Iterable[int]) -> None:
        """What the engine still says of these requests concerns no router."""
        self._places.update(dict.fromkeys(numbers))

    def owned(self) -> list[Place]:
        """The requests that routers wait for."""
        return [place for place in self._places.values() if place is not None]

    def clear(self) -> None:
        self._places.clear()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return once the engine is done with every request."""
        await self._idle.wait()

    def distribute(self, event: StepTokens, outputs: StepOutputs) -> None:
        """Give each router what is its own of the tokens."""
        logprobs = event.logprobs
        rows = [None] * len(event.requests) if logprobs is None else list(logprobs.rows())
        for number, token_id, row in zip(event.requests, event.token_ids, rows, strict=True):
            if place := self._places.get(number):
                output = outputs.of(place.stream)
                output.seqs.append(place.seq)
                output.token_ids.append(token_id)
                if row is not None:
                    output.add_logprobs(row)

    def place(self, number: int) -> Place | None:
        """Whose the request is; None if no router waits for it."""
        return self._places.get(number)

    def finish(self, event: Finished, outputs: StepOutputs) -> None:
        place = self._places.pop(event.request, None)
        if place is not None:
            place.stream.finish(outputs.of(place.stream), _end(event, place.seq))
        if not self._places:
            self._idle.set()


def _end(event: Finished, seq: int) -> RequestEnd:
    return RequestEnd(
        seq=seq,
        reason=event.reason,
        error=to_error(event.failure) if event.failure else None,
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        cached_tokens=event.cached_tokens,
        adapter_load_s=event.adapter_load_s,
        prefill_s=event.prefill_s,
    )
