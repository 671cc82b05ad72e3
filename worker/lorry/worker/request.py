"""Life of one generation request inside the engine.

    WAITING ──► PREFILL ──► DECODE ──► FINISHED
       ▲           │          │
       └───────────┴──────────┘  (preempted)

Every state but the final one may move to FINISHED: cancelled, expired, failed or complete.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorry.worker.messages import Failure, Finished, FinishReason, Submit
from lorry.worker.page_keys import PageKeys

NO_ROW = -1


class RequestState(enum.Enum):
    WAITING = enum.auto()  # without pages; its adapter may still be on its way
    PREFILL = enum.auto()  # has a row and pages; some known tokens are not computed yet
    DECODE = enum.auto()  # one row in every step
    FINISHED = enum.auto()


S = RequestState
TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    S.WAITING: frozenset({S.PREFILL, S.FINISHED}),
    S.PREFILL: frozenset({S.WAITING, S.DECODE, S.FINISHED}),
    S.DECODE: frozenset({S.WAITING, S.FINISHED}),
    S.FINISHED: frozenset(),
}


class IllegalTransition(RuntimeError):
    def __init__(self, request: int, source: RequestState, target: RequestState) -> None:
        super().__init__(f"request {request}: {source.name} -> {target.name}")


@dataclass(slots=True, eq=False)
class Request:
    """A request's parameters and place; while it has a row, the sequence table has the rest."""

    submit: Submit
    arrival_s: float
    token_ids: np.ndarray  # int32; prompt and output as of the last time it had no row
    page_keys: PageKeys
    state: RequestState = RequestState.WAITING
    row: int = NO_ROW  # in the sequence table
    times_passed_over: int = 0  # younger requests that were admitted before it
    cached_pages: int | None = None  # where the last look into the prefix cache ended
    cached_tokens: int = 0  # of the prompt, that the prefix cache had at its first admission
    adapter_load_s: float = 0.0
    prefill_started_s: float | None = None  # when its first chunk was planned
    prefill_s: float = 0.0  # until its first token was read
    num_prompt_reported: int = 0  # prompt rows whose logprobs were sent

    @classmethod
    def of(cls, submit: Submit, now_s: float) -> "Request":
        token_ids = np.array(submit.token_ids, dtype=np.int32)
        return cls(submit, now_s, token_ids, PageKeys(submit.tenant, submit.version))

    @property
    def number(self) -> int:
        """Its arrival order too: the front counts up."""
        return self.submit.request

    @property
    def version(self) -> bytes:
        return self.submit.version

    @property
    def prompt_tokens(self) -> int:
        return len(self.submit.token_ids) - self.submit.generated_tokens

    @property
    def most_tokens(self) -> int:
        """Of prompt and output together."""
        return self.prompt_tokens + self.submit.max_tokens

    @property
    def deadline_s(self) -> float | None:
        remaining_s = self.submit.remaining_s
        return None if remaining_s is None else self.arrival_s + remaining_s

    def move_to(self, target: RequestState) -> None:
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransition(self.number, self.state, target)
        self.state = target

    def finished(self, reason: FinishReason, failure: Failure | None = None) -> Finished:
        """The message of its end; its tokens are in `token_ids` again by now."""
        return Finished(
            request=self.number,
            reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.token_ids) - self.prompt_tokens,
            failure=failure,
            cached_tokens=self.cached_tokens,
            adapter_load_s=self.adapter_load_s,
            prefill_s=self.prefill_s,
        )
