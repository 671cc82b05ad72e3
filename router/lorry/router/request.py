"""Life of one request inside the router.

    RECEIVED ──► QUEUED ──► SUBMITTED ──► STREAMING ──► STOPPING
                   ▲            │             │            │
                   └────────────┴─────────────┘            ▼
                     (its worker was lost)             FINISHED

RECEIVED has its place in the queue but is still tokenized and resolved. STOPPING has met a stop
string and waits for the worker's last word. Every state but the final ones may also move to FAILED
or CANCELLED.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorry.router.generation import Generation, largest_num_tokens
from lorry.router.queue import NOWHERE, Queue
from lorry.router.slo import NO_SLO, Slo


class RequestState(enum.Enum):
    RECEIVED = enum.auto()
    QUEUED = enum.auto()
    SUBMITTED = enum.auto()  # at a worker, which has sent no token yet
    STREAMING = enum.auto()
    STOPPING = enum.auto()
    FINISHED = enum.auto()
    FAILED = enum.auto()
    CANCELLED = enum.auto()

    __hash__ = object.__hash__  # Enum's own is of the name, and not in C


S = RequestState
ENDS = frozenset({S.FAILED, S.CANCELLED})
TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    S.RECEIVED: frozenset({S.QUEUED}) | ENDS,
    S.QUEUED: frozenset({S.SUBMITTED}) | ENDS,
    S.SUBMITTED: frozenset({S.QUEUED, S.STREAMING, S.FINISHED}) | ENDS,
    S.STREAMING: frozenset({S.QUEUED, S.STOPPING, S.FINISHED}) | ENDS,
    S.STOPPING: frozenset({S.FINISHED}) | ENDS,
    S.FINISHED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}
FINAL = frozenset(state for state, targets in TRANSITIONS.items() if not targets)
WAITING = frozenset({S.RECEIVED, S.QUEUED})
AT_WORKER = frozenset({S.SUBMITTED, S.STREAMING, S.STOPPING})


class IllegalTransition(RuntimeError):
    def __init__(self, request_id: str, source: RequestState, target: RequestState) -> None:
        super().__init__(f"request {request_id}: {source.name} -> {target.name}")


@dataclass(slots=True, eq=False)
class Request:
    """One generation. Times are of the event loop's clock."""

    generation: Generation
    seed: int
    arrival_s: float
    deadline_s: float
    slo: Slo = NO_SLO  # with the tenant's and the deployment's defaults
    state: RequestState = RequestState.RECEIVED
    number: int = 0  # in order of arrival, from 1; filled by the dispatcher
    # Filled before it is queued.
    prompt_ids: Sequence[int] = ()
    max_tokens: int = 0
    version: bytes = b""  # empty: the base model
    rank: int = 0
    adapter_bytes: int = 0  # of all its tensors, about
    # Filled by the dispatcher while it is at a worker.
    worker_name: str = ""
    seq: int = 0
    num_losses: int = 0
    num_charged: int = 0  # output tokens that are counted as service, and in the worker's memory
    last_submit_s: float = 0.0
    predicted_ttft_s: float | None = None  # when it was queued first
    predicted_service_s: float | None = None  # from the last submit to the next token
    # Filled by the router as the worker's messages arrive.
    output_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    submitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    tenant: str = field(init=False)
    # Filled by the backlog.
    queue: Queue = field(init=False, default=NOWHERE)
    turn: int = field(init=False, default=0)  # another one whenever it joins the lines; 0: in none

    def __post_init__(self) -> None:
        self.tenant = self.generation.tenant

    def move_to(self, target: RequestState) -> None:
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransition(self.generation.request_id, self.state, target)
        self.state = target

    @property
    def ended(self) -> bool:
        return self.state in FINAL

    @property
    def num_prompt_tokens(self) -> int:
        """Until it is tokenized, as many as the prompt may have."""
        return len(self.prompt_ids) or largest_num_tokens(self.generation.prompt)

    @property
    def num_known_tokens(self) -> int:
        """Tokens that a worker must compute before it draws the next one."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_charged_tokens(self) -> int:
        """Those of them that are counted as in use."""
        return len(self.prompt_ids) + self.num_charged

    @property
    def num_context_tokens(self) -> int:
        """Tokens of prompt and output at most."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """Whether some were asked for and have not come; the first token has none."""
        asked = self.generation.prompt_logprobs is not None
        return asked and self.num_prompt_logprobs < len(self.prompt_ids) - 1

    @property
    def output_complete(self) -> bool:
        """Whether the output so far is all there will be."""
        return len(self.output_ids) >= self.max_tokens or self.ended_by_token

    @property
    def ended_by_token(self) -> bool:
        return bool(self.output_ids) and self.output_ids[-1] in self.generation.stop_token_ids
