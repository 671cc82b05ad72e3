"""What the worker's engine process tells its front: tokens, ends, fetches, and how it is."""

import enum
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from lorry.worker.commands import Failure, Message
from lorry.worker.statistics import StepStatistics, Transfers

NOT_ASKED = -1  # for logprobs


class Started(Message, frozen=True):
    """The first event: the engine can take requests."""

    pages_total: int
    max_running: int
    step_tokens: int
    max_rank: int
    max_context_tokens: int


class RowLogprobs(NamedTuple):
    """Of one token."""

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class TokenLogprobs(Message, frozen=True):
    """Raw logprobs of a step's tokens, as flat lists."""

    logprobs: list[float]  # of each token
    top_counts: list[int]  # alternatives of each token; NOT_ASKED: it has no logprobs at all
    top_token_ids: list[int]  # the alternatives of all tokens, most likely first
    top_logprobs: list[float]

    def rows(self) -> Iterator[RowLogprobs | None]:
        """Those of each token; None where its request did not ask."""
        first = 0
        for logprob, count in zip(self.logprobs, self.top_counts, strict=True):
            end = first + max(count, 0)
            ids, logprobs = self.top_token_ids[first:end], self.top_logprobs[first:end]
            yield None if count == NOT_ASKED else RowLogprobs(logprob, ids, logprobs)
            first = end


class Failed(Message, frozen=True):
    """The last event, alone in its message: what happened, and what to do."""

    message: str


class StepTokens(Message, frozen=True):
    """Tokens that a step drew: requests[i] got token_ids[i]."""

    step: int
    requests: list[int]
    token_ids: list[int]
    logprobs: TokenLogprobs | None = None  # None: no request asked for any


class PromptLogprobs(Message, frozen=True):
    """Of a request's prompt tokens, in order, each once, before its first token."""

    request: int
    first_index: int  # in the prompt; at least 1
    logprobs: TokenLogprobs


class FinishReason(enum.IntEnum):
    """As in the protocol."""

    STOP = 1
    LENGTH = 2
    ABORTED = 3
    CANCELLED = 4


class Finished(Message, frozen=True):
    request: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    failure: Failure | None = None  # of ABORTED
    adapter_load_s: float = 0.0
    prefill_s: float = 0.0
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache


class FetchImage(Message, frozen=True):
    """Fetch a version's page image; answered by ImageReady or ImageFailed."""

    version: bytes


class ReleaseImage(Message, frozen=True):
    """The engine no longer needs the image or the fetch of it."""

    version: bytes


class ResidencyChange(Message, frozen=True):
    """Versions that became usable on the GPU or in host memory, and that no longer are."""

    gpu_added: list[bytes]
    gpu_removed: list[bytes]
    host_added: list[bytes]
    host_removed: list[bytes]


class Status(Message, frozen=True):
    """The engine's state; also its heartbeat, sent every second."""

    running: int = 0
    waiting: int = 0
    queued_prompt_tokens: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_kv: int = 0  # of running requests, pages of the prefix cache that they use included
    pages_adapter: int = 0
    pages_adapter_idle: int = 0  # of those, of adapters that no request uses
    pages_cached: int = 0  # of the prefix cache, that no running request uses
    prefill_tokens_per_s: float = 0.0
    step_times_ms: dict[int, float] = msgspec.field(default_factory=dict)  # by rows, of decodes
    adapter_load_bytes_per_s: float = 0.0
    steps: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    max_adapters_in_step: int = 0  # distinct ones, the base model not counted
    max_adapters_beside_base_in_step: int = 0  # of steps that also had rows of the base model
    graph_replays: int = 0  # steps
    eager_steps: int = 0
    padded_rows: int = 0
    step_statistics: StepStatistics = msgspec.field(default_factory=StepStatistics)
    loads: Transfers = msgspec.field(default_factory=Transfers)  # of adapters into the pool
    prefix_query_tokens: int = 0  # of requests that were looked up, when they were first admitted
    prefix_hit_tokens: int = 0  # of those, that did not have to be computed
    prefix_evictions: int = 0  # pages


class AdminResult(Message, frozen=True):
    call: int
    failure: Failure | None = None


Event = (
    Started
    | Failed
    | StepTokens
    | PromptLogprobs
    | Finished
    | FetchImage
    | ReleaseImage
    | ResidencyChange
    | Status
    | AdminResult
)
