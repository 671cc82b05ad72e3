"""What a client asks to be generated and what it gets, and their translation to messages."""

import enum
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from lorry.rpc.durations import to_duration, to_seconds
from lorry.v1 import common_pb2, inference_service_pb2

MAX_UINT32, MAX_UINT64 = 2**32 - 1, 2**64 - 1


class FinishReason(enum.Enum):
    STOP = common_pb2.FINISH_REASON_STOP  # end of sequence, stop token or stop string
    LENGTH = common_pb2.FINISH_REASON_LENGTH  # max_tokens or the end of the context


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One generation. A field that is None takes the server's default.

    Raises ValueError naming a field and its value that no message can hold.
    """

    prompt: str | Sequence[int] | Sequence[ChatMessage]  # text, token ids or a chat
    adapter: str = ""  # an id, adapters/ID or tenants/ID/adapters/ID; empty = the base model
    model: str = ""  # empty = the one that is served
    request_id: str = ""
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None  # 0 = greedy
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id
    seed: int | None = None
    stop_strings: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None  # alternatives of each token, 0 to 20; None = no logprobs
    prompt_logprobs: int | None = None  # the same, of the prompt's tokens but the first
    slo_ttft_s: float | None = None  # seconds to the first token that are asked for
    slo_tpot_s: float | None = None  # seconds per output token
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens", "top_k", "top_logprobs", "prompt_logprobs"):
            _check_unsigned(name, getattr(self, name), MAX_UINT32)
        if not isinstance(self.prompt, str):
            _check_ids("prompt", [part for part in self.prompt if isinstance(part, int)])
        _check_ids("stop_token_ids", self.stop_token_ids)
        _check_ids("logit_bias", self.logit_bias)
        _check_unsigned("seed", self.seed, MAX_UINT64)
        for name in ("slo_ttft_s", "slo_tpot_s"):
            _check_seconds(name, getattr(self, name))

    def to_proto(self) -> inference_service_pb2.GenerationSpec:
        spec = inference_service_pb2.GenerationSpec(
            request_id=self.request_id,
            model=self.model,
            adapter=adapter_name(self.adapter) if self.adapter else "",
            sampling=self._sampling(),
            stopping=self._stopping(),
            response=common_pb2.ResponseOptions(
                top_logprobs=self.top_logprobs, prompt_logprobs=self.prompt_logprobs
            ),
            slo=self._slo(),
            labels=self.labels,
        )
        _set_prompt(spec, self.prompt)
        return spec

    def _sampling(self) -> common_pb2.SamplingParams:
        return common_pb2.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
        )

    def _slo(self) -> common_pb2.Slo:
        return common_pb2.Slo(
            ttft=None if self.slo_ttft_s is None else to_duration(self.slo_ttft_s),
            tpot=None if self.slo_tpot_s is None else to_duration(self.slo_tpot_s),
        )

    def _stopping(self) -> common_pb2.StoppingOptions:
        return common_pb2.StoppingOptions(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop_strings=self.stop_strings,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token, in nats, before temperature and all else that changes the odds."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # ids and logprobs of the most likely tokens, in order


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new since the last chunk; either part may be empty."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()  # of token_ids, where asked for

    @classmethod
    def from_proto(cls, message: inference_service_pb2.TokenChunk) -> "Chunk":
        return cls(
            token_ids=tuple(message.token_ids),
            text=message.text,
            logprobs=_logprobs(message.token_ids, message.logprobs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """How a generation ended and what it took."""

    request_id: str
    finish_reason: FinishReason
    matched_stop: str | int | None  # the stop string or token id that ended it
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, from the prefix cache
    adapter: str  # tenants/ID/adapters/ID; empty = the base model
    version: str  # of the adapter that served the request, in hex
    queue_s: float
    adapter_load_s: float
    prefill_s: float
    ttft_s: float  # from arrival at the router to the first token

    @classmethod
    def from_proto(cls, message: inference_service_pb2.Completed) -> "Completion":
        stop = message.WhichOneof("matched_stop")
        timings = message.timings
        return cls(
            request_id=message.request_id,
            finish_reason=FinishReason(message.finish_reason),
            matched_stop=getattr(message, stop) if stop else None,
            prompt_tokens=message.usage.prompt_tokens,
            completion_tokens=message.usage.completion_tokens,
            cached_tokens=message.usage.cached_tokens,
            adapter=message.adapter,
            version=message.version.hex(),
            queue_s=to_seconds(timings.queue),
            adapter_load_s=to_seconds(timings.adapter_load),
            prefill_s=to_seconds(timings.prefill),
            ttft_s=to_seconds(timings.ttft),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    text: str
    token_ids: tuple[int, ...]  # with an end-of-sequence or stop token, which text leaves out
    completion: Completion
    logprobs: tuple[TokenLogprobs, ...] = ()  # of token_ids, where asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the second token on, where asked for

    @classmethod
    def from_proto(cls, message: inference_service_pb2.GenerateResponse) -> "Generation":
        return cls(
            text=message.text,
            token_ids=tuple(message.token_ids),
            completion=Completion.from_proto(message.completed),
            logprobs=_logprobs(message.token_ids, message.logprobs),
            prompt_logprobs=read_prompt_logprobs(message.prompt_logprobs),
        )


def adapter_name(text: str) -> str:
    """The resource name that an adapter's id, or name, stands for."""
    return text if "/" in text else f"adapters/{text}"


def read_prompt_logprobs(
    message: inference_service_pb2.PromptLogprobs,
) -> tuple[TokenLogprobs, ...]:
    return _logprobs(message.token_ids, message.logprobs)


def _logprobs(token_ids: Sequence[int], message: common_pb2.Logprobs) -> tuple[TokenLogprobs, ...]:
    if not message.logprobs:
        return ()
    top = zip(message.top_token_ids, message.top_logprobs, strict=True)
    counts = message.top_counts or [0] * len(token_ids)
    return tuple(
        TokenLogprobs(token_id, logprob, tuple(islice(top, count)))
        for token_id, logprob, count in zip(token_ids, message.logprobs, counts, strict=True)
    )


def _check_unsigned(name: str, value: int | None, most: int) -> None:
    if value is not None and not 0 <= value <= most:
        raise ValueError(f"{name} must be 0 to {most}, got {value}")


def _check_ids(name: str, token_ids: Collection[int]) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        _check_unsigned(f"each id of {name}", token_id, MAX_UINT32)


def _check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _set_prompt(
    spec: inference_service_pb2.GenerationSpec,
    prompt: str | Sequence[int] | Sequence[ChatMessage],
) -> None:
    if isinstance(prompt, str):
        spec.prompt = prompt
        return
    spec.token_ids.SetInParent()
    for part in prompt:
        if isinstance(part, ChatMessage):
            spec.chat.messages.add(role=part.role, content=part.content)
        else:
            spec.token_ids.ids.append(part)
