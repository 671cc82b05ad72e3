"""Every field of a GenerationSpec, right and wrong."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict

from lorry.router.generation import (
    Chat,
    ChatMessage,
    Completion,
    FinishReason,
    largest_num_tokens,
)
from lorry.router.slo import Slo
from lorry.router.tokenizer import LONG_PROMPT_BYTES
from lorry.router.translation import SpecReader, to_completed
from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import (
    AdapterNotFound,
    FeatureUnsupported,
    InvalidRequest,
    InvalidSampling,
    LorryError,
    ModelNotFound,
)
from lorry.rpc.names import AdapterName
from lorry.v1 import common_pb2
from lorry.v1 import inference_service_pb2 as pb
from tests.support.byte_model import EOS, NUM_TOKENS


@pytest.fixture(scope="module")
def reader(model: Path) -> SpecReader:
    return SpecReader(read_base_model(model), served_model="byte-model")


def spec(**fields: Any) -> pb.GenerationSpec:
    """A spec from JSON names; with a prompt unless it has an input."""
    if not {"prompt", "token_ids", "chat"} & fields.keys():
        fields["prompt"] = "p"
    return ParseDict(fields, pb.GenerationSpec())


def test_an_empty_spec_takes_the_defaults(reader: SpecReader) -> None:
    read = reader.read(spec(prompt="p"), tenant="t")
    assert (read.tenant, read.adapter, read.prompt) == ("t", None, "p")
    assert (read.temperature, read.seed, read.max_tokens, read.min_tokens) == (1.0, None, None, 0)
    assert (read.top_k, read.top_p, read.min_p, read.top_logprobs) == (0, 1.0, 0.0, None)
    assert (read.repetition_penalty, read.presence_penalty, read.frequency_penalty) == (1, 0, 0)
    assert read.logit_bias == {}
    assert read.stop_strings == ()
    assert read.stop_token_ids == {EOS}
    assert len(read.request_id) == 32


def test_every_served_field_is_read(reader: SpecReader) -> None:
    read = reader.read(
        spec(
            request_id="r-1",
            model="byte-model",
            adapter="adapters/sql",
            token_ids={"ids": [5, 6]},
            sampling={
                "temperature": 0,
                "seed": 2**64 - 1,
                "top_k": 7,
                "top_p": 0.25,
                "min_p": 0.5,
                "repetition_penalty": 1.25,
                "presence_penalty": 2,
                "frequency_penalty": -0.5,
                "logit_bias": {5: 1.5, NUM_TOKENS - 1: -100},
            },
            response={"top_logprobs": 0, "prompt_logprobs": 3},
            stopping={"max_tokens": 9, "min_tokens": 9, "stop_strings": ["é" * 64, "b"]},
            labels={"team": "x" * 63},
        ),
        tenant="t",
    )
    assert (read.request_id, read.adapter) == ("r-1", AdapterName("t", "sql"))
    assert read.prompt == [5, 6]
    assert (read.temperature, read.seed) == (0.0, 2**64 - 1)
    assert (read.top_k, read.top_p, read.min_p) == (7, 0.25, 0.5)
    assert (read.repetition_penalty, read.presence_penalty) == (1.25, 2)
    assert read.frequency_penalty == -0.5
    assert read.logit_bias == {5: 1.5, NUM_TOKENS - 1: -100}
    assert (read.top_logprobs, read.prompt_logprobs) == (0, 3)
    assert (read.max_tokens, read.min_tokens) == (9, 9)
    assert read.stop_strings == ("é" * 64, "b")
    assert read.labels == {"team": "x" * 63}


def test_a_generated_request_id_is_new_each_time(reader: SpecReader) -> None:
    ids = {reader.read(spec(), tenant="t").request_id for _ in range(10)}
    assert len(ids) == 10


INVALID: list[tuple[dict[str, Any], type[LorryError], str, str]] = [
    ({"request_id": "x" * 129}, InvalidRequest, "request_id", "128"),
    ({"request_id": "é"}, InvalidRequest, "request_id", "'é'"),
    ({"request_id": "a\n"}, InvalidRequest, "request_id", "printable"),
    ({"adapter": "sql"}, InvalidRequest, "adapter", "'sql'"),
    ({"prompt": ""}, InvalidRequest, "prompt", "empty"),
    ({"prompt": "é" * 524_289}, InvalidRequest, "prompt", "got 1048578"),
    (
        {"chat": {"messages": [{"role": "user", "content": "x" * 524_288}] * 2}},
        InvalidRequest,
        "chat",
        "got 1048584",
    ),
    ({"token_ids": {}}, InvalidRequest, "token_ids.ids", "at least one"),
    ({"token_ids": {"ids": [3, NUM_TOKENS]}}, InvalidRequest, "token_ids.ids", f"got {NUM_TOKENS}"),
    ({"labels": {f"k{i}": "v" for i in range(17)}}, InvalidRequest, "labels", "got 17"),
    ({"labels": {"k" * 64: "v"}}, InvalidRequest, "labels", "63 bytes"),
    ({"labels": {"k": "é" * 32}}, InvalidRequest, "labels", "63 bytes"),
    ({"labels": {"": "v"}}, InvalidRequest, "labels", "1 to 63 bytes"),
    ({"sampling": {"temperature": -0.5}}, InvalidSampling, "sampling.temperature", "got -0.5"),
    ({"sampling": {"temperature": 10.5}}, InvalidSampling, "sampling.temperature", "got 10.5"),
    ({"sampling": {"temperature": "NaN"}}, InvalidSampling, "sampling.temperature", "got nan"),
    ({"sampling": {"top_p": 0}}, InvalidSampling, "sampling.top_p", "(0, 1], got 0"),
    ({"sampling": {"top_p": 1.5}}, InvalidSampling, "sampling.top_p", "got 1.5"),
    ({"sampling": {"min_p": -0.5}}, InvalidSampling, "sampling.min_p", "got -0.5"),
    ({"sampling": {"repetition_penalty": 0}}, InvalidSampling, "sampling.repetition_penalty", "0"),
    ({"sampling": {"presence_penalty": 3}}, InvalidSampling, "sampling.presence_penalty", "got 3"),
    ({"sampling": {"frequency_penalty": -3}}, InvalidSampling, "sampling.frequency_penalty", "-3"),
    ({"sampling": {"logit_bias": {1: "NaN"}}}, InvalidSampling, "sampling.logit_bias", "got nan"),
    ({"sampling": {"top_p": "NaN"}}, InvalidSampling, "sampling.top_p", "got nan"),
    ({"sampling": {"min_p": "Infinity"}}, InvalidSampling, "sampling.min_p", "got inf"),
    ({"sampling": {"logit_bias": {1: 101}}}, InvalidSampling, "sampling.logit_bias", "got 101"),
    (
        {"sampling": {"logit_bias": {i: 1 for i in range(301)}}},
        InvalidSampling,
        "sampling.logit_bias",
        "got 301",
    ),
    (
        {"sampling": {"logit_bias": {NUM_TOKENS: 1}}},
        InvalidSampling,
        "sampling.logit_bias",
        f"got {NUM_TOKENS}",
    ),
    ({"stopping": {"max_tokens": 0}}, InvalidRequest, "stopping.max_tokens", "got 0"),
    ({"stopping": {"max_tokens": 3, "min_tokens": 4}}, InvalidRequest, "stopping.min_tokens", "4"),
    ({"stopping": {"stop_strings": ["x"] * 17}}, InvalidRequest, "stopping.stop_strings", "got 17"),
    ({"stopping": {"stop_strings": [""]}}, InvalidRequest, "stopping.stop_strings", "got ''"),
    ({"stopping": {"stop_strings": ["é" * 65]}}, InvalidRequest, "stopping.stop_strings", "64"),
    (
        {"stopping": {"stop_token_ids": list(range(65))}},
        InvalidRequest,
        "stopping.stop_token_ids",
        "got 65",
    ),
    (
        {"stopping": {"stop_token_ids": [NUM_TOKENS]}},
        InvalidRequest,
        "stopping.stop_token_ids",
        f"got {NUM_TOKENS}",
    ),
    ({"response": {"top_logprobs": 21}}, InvalidRequest, "response.top_logprobs", "got 21"),
    ({"response": {"prompt_logprobs": 21}}, InvalidRequest, "response.prompt_logprobs", "got 21"),
    ({"chat": {}}, InvalidRequest, "chat.messages", "at least one"),
    ({"chat": {"messages": [{"role": "u"}] * 2049}}, InvalidRequest, "chat.messages", "got 2049"),
    (
        {"chat": {"messages": [{"role": "tool", "tool_call_id": "x" * (1 << 20)}]}},
        InvalidRequest,
        "chat",
        "got 1048580",
    ),
    ({"chat": {"messages": [{"content": "x"}]}}, InvalidRequest, "chat.messages[0].role", "empty"),
    (
        {"chat": {"messages": [{"role": "user"}], "tools_json": "{}"}},
        InvalidRequest,
        "chat.tools_json",
        "array",
    ),
    (
        {"chat": {"messages": [{"role": "user", "tool_calls_json": "[" * 100_000}]}},
        InvalidRequest,
        "chat.messages[0].tool_calls_json",
        "JSON",
    ),
    (
        {
            "chat": {
                "messages": [{"role": "user"}],
                "add_generation_prompt": True,
                "continue_final_message": True,
            }
        },
        InvalidRequest,
        "chat.continue_final_message",
        "add_generation_prompt",
    ),
]


@pytest.mark.parametrize(
    ("fields", "error", "field", "said"), INVALID, ids=lambda value: str(value)[:40]
)
def test_a_wrong_field_is_named_with_its_value(
    reader: SpecReader, fields: dict[str, Any], error: type[LorryError], field: str, said: str
) -> None:
    with pytest.raises(error) as refusal:
        reader.read(spec(**fields), tenant="t")
    assert refusal.type is error
    (violation,) = refusal.value.violations
    assert violation.field == field
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_an_input_is_required(reader: SpecReader) -> None:
    with pytest.raises(InvalidRequest, match="prompt: one of"):
        reader.read(pb.GenerationSpec(), tenant="t")


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"guided": {"regex": "a+"}}, "guided"),
]


@pytest.mark.parametrize(("fields", "field"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_what_is_not_served_yet_is_refused_by_name(
    reader: SpecReader, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(FeatureUnsupported, match=field) as refusal:
        reader.read(spec(**fields), tenant="t")
    assert refusal.value.metadata == {"field": field}


def test_an_slo_may_ask_for_either_time(reader: SpecReader) -> None:
    assert reader.read(spec(), tenant="t").slo == Slo()
    asked = spec()
    asked.slo.ttft.CopyFrom(Duration(seconds=1, nanos=500_000_000))
    assert reader.read(asked, tenant="t").slo == Slo(ttft_s=1.5)
    asked.slo.tpot.CopyFrom(Duration(nanos=50_000_000))
    assert reader.read(asked, tenant="t").slo == Slo(ttft_s=1.5, tpot_s=0.05)


@pytest.mark.parametrize("seconds", [0, -1, 86401])
def test_an_slo_that_cannot_be_meant_is_refused(reader: SpecReader, seconds: int) -> None:
    asked = spec()
    asked.slo.tpot.CopyFrom(Duration(seconds=seconds))
    with pytest.raises(InvalidRequest, match=rf"slo.tpot: must be in .*, got {seconds}"):
        reader.read(asked, tenant="t")


def test_another_model_is_not_found(reader: SpecReader) -> None:
    with pytest.raises(ModelNotFound, match=r"'other'.*'byte-model'"):
        reader.read(spec(model="other"), tenant="t")


def test_another_tenants_adapter_is_not_found(reader: SpecReader) -> None:
    with pytest.raises(AdapterNotFound, match="tenants/u/adapters/sql is not registered"):
        reader.read(spec(adapter="tenants/u/adapters/sql"), tenant="t")


@pytest.mark.parametrize(
    ("fields", "add_generation_prompt", "continue_final_message"),
    [
        ({}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, False, True),
    ],
)
def test_a_chat_ends_as_asked(
    reader: SpecReader,
    fields: dict[str, Any],
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> None:
    message = {"role": "tool", "content": "4", "tool_call_id": "c1", "tool_calls_json": "[1]"}
    chat = {"messages": [message], "tools_json": '[{"a": 1}]'} | fields
    assert reader.read(spec(chat=chat), tenant="t").prompt == Chat(
        messages=[ChatMessage(role="tool", content="4", tool_call_id="c1", tool_calls=(1,))],
        tools=({"a": 1},),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )


def test_a_chat_of_very_many_messages_counts_as_long(reader: SpecReader) -> None:
    """What a template adds is most of it."""
    chat = {"messages": [{"role": "u"}] * 2048}
    prompt = reader.read(spec(chat=chat), tenant="t").prompt
    assert isinstance(prompt, Chat)
    assert len(prompt.messages) == 2048
    assert largest_num_tokens(prompt) > LONG_PROMPT_BYTES


def completion(**fields: Any) -> Completion:
    defaults: dict[str, Any] = {
        "request_id": "r-1",
        "reason": FinishReason.STOP,
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "cached_tokens": 3,
        "adapter": AdapterName("t", "a"),
        "version": b"v",
        "queue_s": 0.25,
        "adapter_load_s": 0.5,
        "prefill_s": 0.75,
        "ttft_s": 2.0,
    }
    return Completion(**(defaults | fields))


def test_a_completion_is_translated_whole() -> None:
    completed = to_completed(completion(stop_string=""))
    assert completed == pb.Completed(
        request_id="r-1",
        finish_reason=common_pb2.FINISH_REASON_STOP,
        stop_string="",
        usage=common_pb2.Usage(prompt_tokens=4, completion_tokens=5, cached_tokens=3),
        adapter="tenants/t/adapters/a",
        version=b"v",
        timings=pb.Timings(
            queue=Duration(nanos=250_000_000),
            adapter_load=Duration(nanos=500_000_000),
            prefill=Duration(nanos=750_000_000),
            ttft=Duration(seconds=2),
        ),
    )


def test_what_ended_it_is_told_apart() -> None:
    by_token = to_completed(completion(stop_token_id=0))
    assert by_token.WhichOneof("matched_stop") == "stop_token_id"
    by_length = to_completed(completion(reason=FinishReason.LENGTH, adapter=None))
    assert by_length.WhichOneof("matched_stop") is None
    assert (by_length.finish_reason, by_length.adapter) == (common_pb2.FINISH_REASON_LENGTH, "")
