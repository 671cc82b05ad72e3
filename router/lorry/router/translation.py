"""Messages of InferenceService to the router's types, checked field by field, and back."""

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from lorry.router.generation import (
    Chat,
    ChatMessage,
    Chunk,
    Completion,
    FinishReason,
    Generation,
    Prompt,
    PromptLogprobs,
    TokenLogprobs,
)
from lorry.router.slo import Slo
from lorry.router.spec_limits import (
    MAX_CHAT_MESSAGES,
    check,
    check_prompt_size,
    check_response,
    check_sampling,
    check_slo,
    check_stopping,
    shown,
)
from lorry.router.store import adapter_not_found
from lorry.rpc.base_model import BaseModel
from lorry.rpc.durations import to_duration, to_seconds
from lorry.rpc.errors import InvalidRequest, InvalidSampling, ModelNotFound
from lorry.rpc.labels import check_labels
from lorry.rpc.names import AdapterName
from lorry.rpc.unsupported import refuse_unsupported
from lorry.v1 import common_pb2
from lorry.v1 import inference_service_pb2 as pb

MAX_REQUEST_ID_CHARS = 128
TEMPLATE_BYTES = 64  # that a template adds to a message of a chat, about

FINISH_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}


class SpecReader:
    """Reads GenerationSpecs for one base model."""

    def __init__(self, base_model: BaseModel, *, served_model: str) -> None:
        self._served_model = served_model
        self._vocab_size = base_model.vocab_size
        self._eos_token_ids = base_model.eos_token_ids

    def read(self, spec: pb.GenerationSpec, *, tenant: str) -> Generation:
        """Raises InvalidRequest, ModelNotFound, AdapterNotFound or FeatureUnsupported."""
        if spec.model not in ("", self._served_model):
            raise ModelNotFound(
                f"model {shown(spec.model)} is not served here; {self._served_model!r} is",
                model=shown(spec.model),
            )
        check_labels(spec.labels)
        check_sampling(spec.sampling)
        check_stopping(spec.stopping)
        check_response(spec.response)
        check_slo(spec.slo)
        refuse_unsupported(spec)
        stopping, sampling, response = spec.stopping, spec.sampling, spec.response
        return Generation(
            request_id=_request_id(spec.request_id),
            tenant=tenant,
            adapter=_adapter(spec.adapter, tenant),
            prompt=self._prompt(spec),
            temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            min_p=sampling.min_p,
            repetition_penalty=(
                sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
            ),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=self._logit_bias(sampling),
            seed=sampling.seed if sampling.HasField("seed") else None,
            max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
            min_tokens=stopping.min_tokens,
            stop_strings=tuple(stopping.stop_strings),
            stop_token_ids=self._stop_token_ids(stopping),
            top_logprobs=response.top_logprobs if response.HasField("top_logprobs") else None,
            prompt_logprobs=(
                response.prompt_logprobs if response.HasField("prompt_logprobs") else None
            ),
            slo=_slo(spec.slo),
            labels=dict(spec.labels),
        )

    def _prompt(self, spec: pb.GenerationSpec) -> Prompt:
        kind = spec.WhichOneof("input")
        if kind == "prompt":
            check("prompt", bool(spec.prompt), "must not be empty")
            check_prompt_size("prompt", [spec.prompt])
            return spec.prompt
        if kind == "token_ids":
            ids = list(spec.token_ids.ids)
            check("token_ids.ids", bool(ids), "must hold at least one token")
            self._check_token_ids("token_ids.ids", ids)
            return ids
        if kind == "chat":
            return _chat(spec.chat)
        raise InvalidRequest.of("prompt", "one of prompt, token_ids and chat is required")

    def _logit_bias(self, sampling: common_pb2.SamplingParams) -> dict[int, float]:
        largest = max(sampling.logit_bias, default=0)
        if largest >= self._vocab_size:
            raise InvalidSampling.of(
                "sampling.logit_bias", f"token ids must be below {self._vocab_size}, got {largest}"
            )
        return dict(sampling.logit_bias)

    def _stop_token_ids(self, stopping: common_pb2.StoppingOptions) -> frozenset[int]:
        self._check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids)
        asked = frozenset(stopping.stop_token_ids)
        return asked if stopping.ignore_eos else asked | self._eos_token_ids

    def _check_token_ids(self, field: str, token_ids: Iterable[int]) -> None:
        largest = max(token_ids, default=0)
        check(field, largest < self._vocab_size, f"must be below {self._vocab_size}", largest)


def _slo(slo: common_pb2.Slo) -> Slo:
    return Slo(
        ttft_s=to_seconds(slo.ttft) if slo.HasField("ttft") else None,
        tpot_s=to_seconds(slo.tpot) if slo.HasField("tpot") else None,
    )


def to_chunk(chunk: Chunk) -> pb.StreamGenerateResponse:
    """On the hot path: filled in place, as a message that is copied into another costs half more
    (1.6 us and not 1.0)."""
    if chunk.prompt:
        return pb.StreamGenerateResponse(prompt_logprobs=_prompt_logprobs(chunk.prompt))
    response = pb.StreamGenerateResponse()
    message = response.chunk
    message.token_ids.extend(chunk.token_ids)
    message.text = chunk.text
    logprobs = _logprobs(chunk.logprobs)
    if logprobs is not None:
        message.logprobs.CopyFrom(logprobs)
    return response


def to_response(chunk: Chunk | None, completion: Completion) -> pb.GenerateResponse:
    token_ids, text, logprobs, prompt = chunk or Chunk([], "")
    return pb.GenerateResponse(
        text=text,
        token_ids=token_ids,
        logprobs=_logprobs(logprobs),
        prompt_logprobs=_prompt_logprobs(prompt) if prompt else None,
        completed=to_completed(completion),
    )


def to_completed(completion: Completion) -> pb.Completed:
    completed = pb.Completed(
        request_id=completion.request_id,
        finish_reason=FINISH_REASONS[completion.reason],
        usage=common_pb2.Usage(
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            cached_tokens=completion.cached_tokens,
        ),
        adapter=str(completion.adapter or ""),
        version=completion.version,
        timings=pb.Timings(
            queue=to_duration(completion.queue_s),
            adapter_load=to_duration(completion.adapter_load_s),
            prefill=to_duration(completion.prefill_s),
            ttft=to_duration(completion.ttft_s),
        ),
    )
    if completion.stop_string is not None:
        completed.stop_string = completion.stop_string
    elif completion.stop_token_id is not None:
        completed.stop_token_id = completion.stop_token_id
    return completed


def _prompt_logprobs(parts: Sequence[PromptLogprobs]) -> pb.PromptLogprobs:
    message = pb.PromptLogprobs(first_index=parts[0].first_index)
    for part in parts:
        message.token_ids.extend(part.token_ids)
        message.logprobs.logprobs.extend(part.logprobs)
        if part.top_ids:
            message.logprobs.top_counts.extend([part.num_top] * len(part.logprobs))
            message.logprobs.top_token_ids.extend(part.top_ids)
            message.logprobs.top_logprobs.extend(part.top_logprobs)
    return message


def _logprobs(rows: Sequence[TokenLogprobs]) -> common_pb2.Logprobs | None:
    """None where they were not asked for."""
    if not rows:
        return None
    top_counts = [len(row.top_ids) for row in rows]
    return common_pb2.Logprobs(
        logprobs=[row.logprob for row in rows],
        top_counts=top_counts if any(top_counts) else [],
        top_token_ids=[token_id for row in rows for token_id in row.top_ids],
        top_logprobs=[logprob for row in rows for logprob in row.top_logprobs],
    )


def _request_id(request_id: str) -> str:
    printable = request_id.isascii() and (request_id.isprintable())
    check(
        "request_id",
        printable and len(request_id) <= MAX_REQUEST_ID_CHARS,
        f"must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters",
        request_id,
    )
    return request_id or uuid.uuid4().hex


def _adapter(text: str, tenant: str) -> AdapterName | None:
    if not text:
        return None
    name = AdapterName.parse(text, tenant=tenant)
    if name.tenant != tenant:
        raise adapter_not_found(name)
    return name


def _chat(chat: pb.ChatPrompt) -> Chat:
    num_messages = len(chat.messages)
    check("chat.messages", num_messages > 0, "must hold at least one message")
    what = f"must be at most {MAX_CHAT_MESSAGES}"
    check("chat.messages", num_messages <= MAX_CHAT_MESSAGES, what, num_messages)
    texts = (
        text
        for message in chat.messages
        for text in (message.role, message.content, message.tool_calls_json, message.tool_call_id)
    )
    num_bytes = check_prompt_size("chat", (chat.tools_json, *texts))
    opened = chat.continue_final_message
    if opened and chat.HasField("add_generation_prompt") and chat.add_generation_prompt:
        raise InvalidRequest.of(
            "chat.continue_final_message", "excludes add_generation_prompt, both are true"
        )
    return Chat(
        messages=[_message(index, message) for index, message in enumerate(chat.messages)],
        tools=_json_array("chat.tools_json", chat.tools_json),
        add_generation_prompt=not opened
        and (chat.add_generation_prompt or not chat.HasField("add_generation_prompt")),
        continue_final_message=opened,
        num_bytes=num_bytes + num_messages * TEMPLATE_BYTES,
    )


def _message(index: int, message: pb.ChatMessage) -> ChatMessage:
    field = f"chat.messages[{index}]"
    check(f"{field}.role", bool(message.role), "must not be empty")
    return ChatMessage(
        role=message.role,
        content=message.content,
        tool_calls=_json_array(f"{field}.tool_calls_json", message.tool_calls_json),
        tool_call_id=message.tool_call_id,
    )


def _json_array(field: str, text: str) -> Sequence[Any]:
    if not text:
        return ()
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.of(field, f"must be JSON: {error}") from error
    check(field, isinstance(array, list), "must be a JSON array", text)
    return tuple(array)
