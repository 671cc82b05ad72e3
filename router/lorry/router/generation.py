"""What a client asks for and what it gets, in the router's own types."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorry.router.slo import NO_SLO, Slo
from lorry.rpc.names import AdapterName


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    role: str
    content: str
    tool_calls: Sequence[Any] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    messages: Sequence[ChatMessage]
    tools: Sequence[Any] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    num_bytes: int = field(default=0, compare=False)  # of its texts and a template, about


Prompt = str | Sequence[int] | Chat


def largest_num_tokens(prompt: Prompt) -> int:
    """How many tokens a prompt has at most; of what a template adds this is only an estimate."""
    if isinstance(prompt, Chat):
        return prompt.num_bytes
    return len(prompt.encode()) if isinstance(prompt, str) else len(prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A validated request for output. None takes the router's default."""

    request_id: str
    tenant: str
    adapter: AdapterName | None  # None: the base model
    prompt: Prompt
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_strings: Sequence[str] = ()
    stop_token_ids: frozenset[int] = frozenset()  # with the model's end-of-sequence tokens
    top_logprobs: int | None = None  # alternatives of each token; None: no logprobs at all
    prompt_logprobs: int | None = None  # the same, of the prompt's tokens
    slo: Slo = NO_SLO
    labels: Mapping[str, str] = field(default_factory=dict)


class FinishReason(enum.Enum):
    STOP = enum.auto()
    LENGTH = enum.auto()


class TokenLogprobs(NamedTuple):
    """Raw logprobs of one token."""

    logprob: float
    top_ids: Sequence[int] = ()  # most likely first
    top_logprobs: Sequence[float] = ()


class Logprobs(NamedTuple):
    """Raw logprobs of tokens in flat lists."""

    logprobs: Sequence[float]  # of each token
    top_ids: Sequence[int]  # the alternatives of all tokens, equally many of each
    top_logprobs: Sequence[float]


class PromptLogprobs(NamedTuple):
    """Raw logprobs of consecutive tokens of the prompt, in flat lists: there can be very many."""

    first_index: int  # in the prompt; at least 1
    token_ids: Sequence[int]
    logprobs: Sequence[float]  # of each token
    top_ids: Sequence[int]  # the alternatives of all tokens, equally many of each
    top_logprobs: Sequence[float]

    @property
    def num_top(self) -> int:
        """Alternatives of each token."""
        return len(self.top_ids) // max(1, len(self.logprobs))

    def after(self, count: int) -> "PromptLogprobs":
        """What follows the first `count` tokens."""
        first_top = count * self.num_top
        return PromptLogprobs(
            self.first_index + count,
            self.token_ids[count:],
            self.logprobs[count:],
            self.top_ids[first_top:],
            self.top_logprobs[first_top:],
        )


class Chunk(NamedTuple):
    """What is new since the last one."""

    token_ids: list[int]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()  # of token_ids, where asked for
    prompt: tuple[PromptLogprobs, ...] = ()  # come alone, or all with a whole answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How an output ended well."""

    request_id: str
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    adapter: AdapterName | None
    version: bytes
    queue_s: float
    adapter_load_s: float
    prefill_s: float
    ttft_s: float
