"""Messages of InferenceService to the router's types, checked field by field, and back."""

import json
import math
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from lorry.router.generation import (
    Chat,
    ChatMessage,
    Chunk,
    Completion,
    FinishReason,
    Generation,
    Prompt,
)
from lorry.router.store import adapter_not_found
from lorry.rpc.base_model import BaseModel
from lorry.rpc.errors import (
    FeatureUnsupported,
    InvalidRequest,
    InvalidSampling,
    ModelNotFound,
)
from lorry.rpc.names import AdapterName
from lorry.v1 import common_pb2
from lorry.v1 import inference_service_pb2 as pb

MAX_REQUEST_ID_CHARS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LABELS = 16
MAX_LABEL_BYTES = 63
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
SHOWN_CHARS = 200  # of a wrong value, in the error that names it

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
                f"model {_shown(spec.model)} is not served here; {self._served_model!r} is",
                model=_shown(spec.model),
            )
        _check_labels(spec.labels)
        _check_sampling(spec.sampling)
        _check_stopping(spec.stopping)
        _check_response(spec.response)
        _refuse_unsupported(spec)
        stopping, sampling = spec.stopping, spec.sampling
        return Generation(
            request_id=_request_id(spec.request_id),
            tenant=tenant,
            adapter=_adapter(spec.adapter, tenant),
            prompt=self._prompt(spec),
            temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
            seed=sampling.seed if sampling.HasField("seed") else None,
            max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
            min_tokens=stopping.min_tokens,
            stop_strings=tuple(stopping.stop_strings),
            stop_token_ids=self._stop_token_ids(stopping),
            labels=dict(spec.labels),
        )

    def _prompt(self, spec: pb.GenerationSpec) -> Prompt:
        kind = spec.WhichOneof("input")
        if kind == "prompt":
            return spec.prompt
        if kind == "token_ids":
            ids = list(spec.token_ids.ids)
            _check("token_ids.ids", bool(ids), "must hold at least one token")
            self._check_token_ids("token_ids.ids", ids)
            return ids
        if kind == "chat":
            return _chat(spec.chat)
        raise InvalidRequest.of("prompt", "one of prompt, token_ids and chat is required")

    def _stop_token_ids(self, stopping: common_pb2.StoppingOptions) -> frozenset[int]:
        self._check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids)
        asked = frozenset(stopping.stop_token_ids)
        return asked if stopping.ignore_eos else asked | self._eos_token_ids

    def _check_token_ids(self, field: str, token_ids: Iterable[int]) -> None:
        largest = max(token_ids, default=0)
        _check(field, largest < self._vocab_size, f"must be below {self._vocab_size}", largest)


def to_chunk(chunk: Chunk) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(
        chunk=pb.TokenChunk(token_ids=chunk.token_ids, text=chunk.text)
    )


def to_response(chunk: Chunk | None, completion: Completion) -> pb.GenerateResponse:
    token_ids, text = chunk or ([], "")
    return pb.GenerateResponse(text=text, token_ids=token_ids, completed=to_completed(completion))


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
            queue=_duration(completion.queue_s),
            adapter_load=_duration(completion.adapter_load_s),
            prefill=_duration(completion.prefill_s),
            ttft=_duration(completion.ttft_s),
        ),
    )
    if completion.stop_string is not None:
        completed.stop_string = completion.stop_string
    elif completion.stop_token_id is not None:
        completed.stop_token_id = completion.stop_token_id
    return completed


def _request_id(request_id: str) -> str:
    printable = request_id.isascii() and (request_id.isprintable())
    _check(
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
    _check("chat.messages", bool(chat.messages), "must hold at least one message")
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
    )


def _message(index: int, message: pb.ChatMessage) -> ChatMessage:
    field = f"chat.messages[{index}]"
    _check(f"{field}.role", bool(message.role), "must not be empty")
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
    _check(field, isinstance(array, list), "must be a JSON array", text)
    return tuple(array)


def _check_labels(labels: Any) -> None:
    _check("labels", len(labels) <= MAX_LABELS, f"must be at most {MAX_LABELS}", len(labels))
    for text in (*labels.keys(), *labels.values()):
        short = len(text.encode()) <= MAX_LABEL_BYTES
        _check("labels", short, f"keys and values must be at most {MAX_LABEL_BYTES} bytes", text)


def _check_sampling(sampling: common_pb2.SamplingParams) -> None:
    set_fields = {field.name: value for field, value in sampling.ListFields()}

    def in_range(field: str, least: float, most: float, *, open_below: bool = False) -> None:
        value = set_fields.get(field, most)
        if not (least < value <= most if open_below else least <= value <= most):
            opening = "(" if open_below else "["
            raise InvalidSampling.of(
                f"sampling.{field}", f"must be in {opening}{least:g}, {most:g}], got {value:g}"
            )

    in_range("temperature", 0, 10)
    in_range("top_p", 0, 1, open_below=True)
    in_range("min_p", 0, 1)
    in_range("repetition_penalty", 0, 10, open_below=True)
    in_range("presence_penalty", -2, 2)
    in_range("frequency_penalty", -2, 2)
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidSampling.of(
            "sampling.logit_bias",
            f"must hold at most {MAX_LOGIT_BIASES} entries, got {len(sampling.logit_bias)}",
        )
    for value in sampling.logit_bias.values():
        if not -100 <= value <= 100:
            raise InvalidSampling.of(
                "sampling.logit_bias", f"must be in [-100, 100], got {value:g}"
            )


def _check_stopping(stopping: common_pb2.StoppingOptions) -> None:
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else math.inf
    _check("stopping.max_tokens", max_tokens > 0, "must be positive", max_tokens)
    _check(
        "stopping.min_tokens",
        stopping.min_tokens <= max_tokens,
        f"must be at most max_tokens, {max_tokens}",
        stopping.min_tokens,
    )
    _check(
        "stopping.stop_strings",
        len(stopping.stop_strings) <= MAX_STOP_STRINGS,
        f"must be at most {MAX_STOP_STRINGS}",
        len(stopping.stop_strings),
    )
    for text in stopping.stop_strings:
        sized = 1 <= len(text.encode()) <= MAX_STOP_STRING_BYTES
        what = f"each must be 1 to {MAX_STOP_STRING_BYTES} bytes"
        _check("stopping.stop_strings", sized, what, text)
    _check(
        "stopping.stop_token_ids",
        len(stopping.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
        f"must be at most {MAX_STOP_TOKEN_IDS}",
        len(stopping.stop_token_ids),
    )


def _check_response(response: common_pb2.ResponseOptions) -> None:
    for field in ("top_logprobs", "prompt_logprobs"):
        value = getattr(response, field)
        _check(
            f"response.{field}",
            value <= MAX_TOP_LOGPROBS,
            f"must be in [0, {MAX_TOP_LOGPROBS}]",
            value,
        )


def _refuse_unsupported(spec: pb.GenerationSpec) -> None:
    """Name what is asked for and not served yet; a value that changes nothing is no such thing."""
    sampling, response = spec.sampling, spec.response
    asked = {
        "sampling.top_p": sampling.HasField("top_p") and sampling.top_p != 1,
        "sampling.top_k": sampling.top_k != 0,
        "sampling.min_p": sampling.min_p != 0,
        "sampling.repetition_penalty": sampling.HasField("repetition_penalty")
        and sampling.repetition_penalty != 1,
        "sampling.presence_penalty": sampling.presence_penalty != 0,
        "sampling.frequency_penalty": sampling.frequency_penalty != 0,
        "sampling.logit_bias": len(sampling.logit_bias) > 0,
        "response.top_logprobs": response.HasField("top_logprobs"),
        "response.prompt_logprobs": response.HasField("prompt_logprobs"),
        "guided": spec.HasField("guided"),
        "slo": spec.HasField("slo"),
    }
    for field, is_asked in asked.items():
        if is_asked:
            raise FeatureUnsupported(f"{field} is not supported yet", field=field)


def _check(field: str, holds: bool, description: str, value: object = None) -> None:
    """Raise InvalidRequest that names the field and, if given, its value."""
    if not holds:
        got = "" if value is None else f", got {_shown(value)}"
        raise InvalidRequest.of(field, description + got)


def _shown(value: object) -> str:
    return repr(value[:SHOWN_CHARS] if isinstance(value, str) else value)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, int(seconds * 1e9)))
    return duration
