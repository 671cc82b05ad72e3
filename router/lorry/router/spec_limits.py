"""Limits of the fields of a GenerationSpec. Each error names the field and the value."""

import math
from collections.abc import Iterable

from lorry.rpc.durations import to_seconds
from lorry.rpc.errors import InvalidRequest, InvalidSampling
from lorry.v1 import common_pb2

MAX_PROMPT_BYTES = 1 << 20  # of text, or of all texts of a chat
MAX_CHAT_MESSAGES = 2048
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 64
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 300
MAX_TOP_LOGPROBS = 20
MAX_SLO_S = 86400
SHOWN_CHARS = 200  # of a wrong value, in the error that names it


def check_sampling(sampling: common_pb2.SamplingParams) -> None:
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


def check_stopping(stopping: common_pb2.StoppingOptions) -> None:
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else math.inf
    check("stopping.max_tokens", max_tokens > 0, "must be positive", max_tokens)
    check(
        "stopping.min_tokens",
        stopping.min_tokens <= max_tokens,
        f"must be at most max_tokens, {max_tokens}",
        stopping.min_tokens,
    )
    check(
        "stopping.stop_strings",
        len(stopping.stop_strings) <= MAX_STOP_STRINGS,
        f"must be at most {MAX_STOP_STRINGS}",
        len(stopping.stop_strings),
    )
    for text in stopping.stop_strings:
        sized = 1 <= len(text) <= MAX_STOP_STRING_CHARS
        what = f"each must be 1 to {MAX_STOP_STRING_CHARS} characters"
        check("stopping.stop_strings", sized, what, text)
    check(
        "stopping.stop_token_ids",
        len(stopping.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
        f"must be at most {MAX_STOP_TOKEN_IDS}",
        len(stopping.stop_token_ids),
    )


def check_prompt_size(field: str, texts: Iterable[str]) -> int:
    """The bytes of all texts."""
    num_bytes = sum(len(text.encode()) for text in texts)
    what = f"must be at most {MAX_PROMPT_BYTES} bytes"
    check(field, num_bytes <= MAX_PROMPT_BYTES, what, num_bytes)
    return num_bytes


def check_response(response: common_pb2.ResponseOptions) -> None:
    for field in ("top_logprobs", "prompt_logprobs"):
        value = getattr(response, field)
        check(
            f"response.{field}",
            value <= MAX_TOP_LOGPROBS,
            f"must be in [0, {MAX_TOP_LOGPROBS}]",
            value,
        )


def check_slo(slo: common_pb2.Slo) -> None:
    for field, duration in slo.ListFields():
        seconds = to_seconds(duration)
        what = f"must be in (0, {MAX_SLO_S}] seconds"
        check(f"slo.{field.name}", 0 < seconds <= MAX_SLO_S, what, seconds)


def check(field: str, holds: bool, description: str, value: object = None) -> None:
    """Raise InvalidRequest that names the field and, if given, its value."""
    if not holds:
        got = "" if value is None else f", got {shown(value)}"
        raise InvalidRequest.of(field, description + got)


def shown(value: object) -> str:
    return repr(value[:SHOWN_CHARS] if isinstance(value, str) else value)
