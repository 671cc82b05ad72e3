"""What the worker's front and its engine process tell each other, as MessagePack by msgspec.

The front speaks gRPC and fetches page images; the engine owns the GPU. Each sends lists of these
messages over a ring. A request is known by a number that the front chooses and never reuses.
"""

import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from lorry.worker.statistics import StepStatistics, Transfers


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages."""


class Failure(Message, frozen=True):
    """An error of lorry.rpc.errors by its reason; the front makes the status."""

    reason: str
    message: str
    metadata: dict[str, str] = {}


NOT_ASKED = -1  # for logprobs

# From the front to the engine


class Submit(Message, frozen=True):
    """One request; every one ends in exactly one Finished."""

    request: int
    tenant: str
    version: bytes  # empty: the base model
    token_ids: list[int]  # the prompt, then what was already output
    generated_tokens: int  # how many of token_ids were already output
    max_tokens: int  # of output, generated_tokens included
    min_tokens: int
    stop_token_ids: list[int]
    temperature: float
    seed: int  # unsigned 64 bits
    remaining_s: float | None  # of the deadline
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_logprobs: int | None = None  # the same as top_logprobs, of the prompt's tokens
    logit_bias: dict[int, float] = {}  # by token id
    top_logprobs: int | None = None  # alternatives of each token; None: no logprobs at all


class Cancel(Message, frozen=True):
    requests: list[int]


class Prefetch(Message, frozen=True):
    """The versions wanted next, most urgent first; replaces the last set."""

    versions: list[bytes]


class ImageModule(Message, frozen=True):
    name: str
    row_offset: int
    b_row_offset: int
    scale_per_layer: list[float]


class ImageFile(Message, frozen=True):
    """Where one tensor-parallel rank's page image begins; it is as long as the first rank's."""

    path: str
    offset: int


class ImageReady(Message, frozen=True):
    """A version's page image is in a shared-memory file that the engine may map."""

    version: bytes
    path: str
    offset: int
    image_bytes: int
    pages: int
    rank: int
    modules: list[ImageModule]
    copied: bool = False  # it came in chunks, to a file of this worker's own
    other_ranks: list[ImageFile] = []  # the second tensor-parallel rank's image, and so on

    def of_other_ranks(self) -> Iterator["ImageReady"]:
        """What each of them maps: images are described alike on all ranks."""
        for file in self.other_ranks:
            yield msgspec.structs.replace(self, path=file.path, offset=file.offset, other_ranks=[])


class ImageFailed(Message, frozen=True):
    version: bytes
    failure: Failure


class ReclaimImage(Message, frozen=True):
    """The store needs the image's memory: unmap as soon as no copy runs, then ReleaseImage."""

    version: bytes


class PinAdapter(Message, frozen=True):
    """Load a version if need be and keep it; answered by an AdminResult once it is resident."""

    call: int
    version: bytes


class UnpinAdapter(Message, frozen=True):
    call: int
    version: bytes


class EvictAdapter(Message, frozen=True):
    call: int
    version: bytes


class Stop(Message, frozen=True):
    """End the engine process."""


Command = (
    Submit
    | Cancel
    | Prefetch
    | ImageReady
    | ImageFailed
    | ReclaimImage
    | PinAdapter
    | UnpinAdapter
    | EvictAdapter
    | Stop
)

# From the engine to the front


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
    step_times_ms: dict[int, float] = {}  # by rows, of steps of decodes only
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


class Codec:
    """Encodes lists of messages; decodes what the other side sent."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._commands = msgspec.msgpack.Decoder(list[Command])
        self._events = msgspec.msgpack.Decoder(list[Event])

    def encode(self, messages: Sequence[Command] | Sequence[Event]) -> bytes:
        return self._encoder.encode(messages)

    def decode_commands(self, data: bytes) -> list[Command]:
        return self._commands.decode(data)

    def decode_events(self, data: bytes) -> list[Event]:
        return self._events.decode(data)
