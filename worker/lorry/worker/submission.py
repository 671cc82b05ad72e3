"""A Submit as the router sends it, checked and made the engine's. Nothing is ignored silently."""

from dataclasses import dataclass
from typing import Literal

from lorry.rpc.durations import to_seconds
from lorry.rpc.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    InvalidSampling,
    Violation,
)
from lorry.rpc.names import check_sha256
from lorry.rpc.unsupported import refuse_unsupported
from lorry.v1 import common_pb2, worker_service_pb2
from lorry.worker.messages import Submit
from lorry.worker.sequences import MAX_LOGIT_BIASES, MAX_STOP_IDS

MAX_TEMPERATURE = 10.0
MIN_TEMPERATURE = 1e-6  # below it is greedy, before logits / temperature leaves the range of fp32
MAX_REPETITION_PENALTY = 10.0
MAX_PENALTY = 2.0  # of presence and of frequency
MAX_LOGIT_BIAS = 100.0
MAX_TOP_LOGPROBS = 20
TopField = Literal["top_logprobs", "prompt_logprobs"]
TOP_FIELDS: tuple[TopField, ...] = ("top_logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    vocab_size: int
    max_context_tokens: int


def to_submit(message: worker_service_pb2.Submit, number: int, limits: RequestLimits) -> Submit:
    """The engine's request `number`; raises InvalidRequest or FeatureUnsupported naming a field."""
    refuse_unsupported(message)
    _check_tokens(message, limits)
    _check_stop_token_ids(message, limits)
    _check_sampling(message.sampling)
    _check_penalties(message.sampling)
    _check_logit_bias(message.sampling, limits)
    _check_response(message.response)
    sampling, temperature = message.sampling, _temperature(message.sampling)
    return Submit(
        request=number,
        tenant=message.tenant,
        version=message.version,
        token_ids=list(message.token_ids),
        generated_tokens=message.generated_tokens,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=list(message.stop_token_ids),
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        seed=sampling.seed,
        remaining_s=to_seconds(message.remaining) if message.HasField("remaining") else None,
        top_k=sampling.top_k if sampling.top_k < limits.vocab_size else 0,
        top_p=_top_p(sampling),
        min_p=sampling.min_p,
        top_logprobs=_num_top("top_logprobs", message.response, limits),
        prompt_logprobs=_num_top("prompt_logprobs", message.response, limits),
        repetition_penalty=_repetition_penalty(sampling),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
    )


def _check_tokens(message: worker_service_pb2.Submit, limits: RequestLimits) -> None:
    generated = message.generated_tokens
    num_prompt = len(message.token_ids) - generated
    if message.version:
        check_sha256(message.version, field="version")
    if num_prompt < 1:
        raise InvalidRequest.of(
            "token_ids",
            f"must hold a prompt before {generated} generated_tokens, got {len(message.token_ids)}",
        )
    if (largest := max(message.token_ids)) >= limits.vocab_size:
        raise InvalidRequest.of("token_ids", f"must be below {limits.vocab_size}, got {largest}")
    if message.max_tokens <= generated:
        raise InvalidRequest.of(
            "max_tokens", f"must be above generated_tokens, {generated}, got {message.max_tokens}"
        )
    if message.min_tokens > message.max_tokens:
        raise InvalidRequest.of(
            "min_tokens",
            f"must not exceed max_tokens, {message.max_tokens}, got {message.min_tokens}",
        )
    total = num_prompt + message.max_tokens
    if total > limits.max_context_tokens:
        text = f"prompt and max_tokens are {total} tokens, of at most {limits.max_context_tokens}"
        raise ContextLengthExceeded(
            text,
            violations=[Violation("max_tokens", text)],
            tokens=total,
            maxContextTokens=limits.max_context_tokens,
        )


def _check_stop_token_ids(message: worker_service_pb2.Submit, limits: RequestLimits) -> None:
    if len(message.stop_token_ids) > MAX_STOP_IDS:
        raise InvalidRequest.of(
            "stop_token_ids", f"must be at most {MAX_STOP_IDS}, got {len(message.stop_token_ids)}"
        )
    largest = max(message.stop_token_ids, default=0)
    if largest >= limits.vocab_size:
        raise InvalidRequest.of(
            "stop_token_ids", f"must be below {limits.vocab_size}, got {largest}"
        )


def _check_sampling(sampling: common_pb2.SamplingParams) -> None:
    if not sampling.HasField("seed"):
        raise InvalidSampling.of("sampling.seed", "must be set")
    if not 0.0 <= _temperature(sampling) <= MAX_TEMPERATURE:
        raise InvalidSampling.of(
            "sampling.temperature", f"must be in [0, {MAX_TEMPERATURE}], got {sampling.temperature}"
        )
    if not 0.0 < _top_p(sampling) <= 1.0:
        raise InvalidSampling.of("sampling.top_p", f"must be in (0, 1], got {sampling.top_p}")
    if not 0.0 <= sampling.min_p <= 1.0:
        raise InvalidSampling.of("sampling.min_p", f"must be in [0, 1], got {sampling.min_p}")


def _check_penalties(sampling: common_pb2.SamplingParams) -> None:
    if not 0.0 < _repetition_penalty(sampling) <= MAX_REPETITION_PENALTY:
        raise InvalidSampling.of(
            "sampling.repetition_penalty",
            f"must be in (0, {MAX_REPETITION_PENALTY}], got {sampling.repetition_penalty}",
        )
    for field in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, field)
        if not -MAX_PENALTY <= value <= MAX_PENALTY:
            raise InvalidSampling.of(
                f"sampling.{field}", f"must be in [{-MAX_PENALTY}, {MAX_PENALTY}], got {value}"
            )


def _check_logit_bias(sampling: common_pb2.SamplingParams, limits: RequestLimits) -> None:
    biases = sampling.logit_bias
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidSampling.of(
            "sampling.logit_bias",
            f"must hold at most {MAX_LOGIT_BIASES} entries, got {len(biases)}",
        )
    if (largest := max(biases, default=0)) >= limits.vocab_size:
        raise InvalidSampling.of(
            "sampling.logit_bias",
            f"token ids must be below {limits.vocab_size}, got {largest}",
        )
    for value in biases.values():
        if not -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS:
            raise InvalidSampling.of(
                "sampling.logit_bias",
                f"must be in [{-MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}], got {value}",
            )


def _check_response(response: common_pb2.ResponseOptions) -> None:
    for field in TOP_FIELDS:
        value = getattr(response, field)
        if value > MAX_TOP_LOGPROBS:
            raise InvalidRequest.of(
                f"response.{field}", f"must be in [0, {MAX_TOP_LOGPROBS}], got {value}"
            )


def _temperature(sampling: common_pb2.SamplingParams) -> float:
    return sampling.temperature if sampling.HasField("temperature") else 1.0


def _repetition_penalty(sampling: common_pb2.SamplingParams) -> float:
    return sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0


def _top_p(sampling: common_pb2.SamplingParams) -> float:
    return sampling.top_p if sampling.HasField("top_p") else 1.0


def _num_top(
    field: TopField, response: common_pb2.ResponseOptions, limits: RequestLimits
) -> int | None:
    if not response.HasField(field):
        return None
    asked: int = getattr(response, field)
    return min(asked, limits.vocab_size)
