import asyncio
import json
import threading
import time
from pathlib import Path

import pytest

from lorry.router.detokenizer import UnsupportedTokenizer
from lorry.router.generation import Chat, ChatMessage
from lorry.router.tokenizer import Tokenizer
from lorry.rpc.errors import InvalidRequest
from tests.support.byte_model import BOS, tokens_of, write_byte_model


@pytest.fixture
def tokenizer(model: Path):
    built = Tokenizer.read(model, num_threads=2)
    yield built
    built.close()


def chat(*texts: str, **fields) -> Chat:
    roles = ("user", "assistant") * len(texts)
    messages = [ChatMessage(role=r, content=t) for r, t in zip(roles, texts, strict=False)]
    return Chat(messages=messages, **fields)


async def test_text_gets_the_models_special_tokens(tokenizer: Tokenizer) -> None:
    assert await tokenizer.encode("hé") == [BOS, *tokens_of("hé")]


async def test_special_tokens_in_a_prompt_are_read_as_such(tokenizer: Tokenizer) -> None:
    assert await tokenizer.encode("<bos>a") == [BOS, BOS, *tokens_of("a")]


async def test_token_ids_stay_as_they_are(tokenizer: Tokenizer) -> None:
    assert await tokenizer.encode([5, 6]) == [5, 6]


async def test_a_chat_is_written_by_the_template_alone(tokenizer: Tokenizer) -> None:
    assert await tokenizer.encode(chat(" hi ")) == tokens_of("[user]hi\n[assistant]")
    closed = chat("hi", "yo", add_generation_prompt=False)
    assert await tokenizer.encode(closed) == tokens_of("[user]hi\n[assistant]yo\n")


async def test_a_continued_message_is_left_open(tokenizer: Tokenizer) -> None:
    opened = chat("hi", " yo ", add_generation_prompt=False, continue_final_message=True)
    assert await tokenizer.encode(opened) == tokens_of("[user]hi\n[assistant]yo")


async def test_tools_reach_the_template_as_plain_json(tokenizer: Tokenizer) -> None:
    tools = chat("hi", tools=({"name": "<é>"},), add_generation_prompt=False)
    assert await tokenizer.encode(tools) == tokens_of('[user]hi\n[{"name": "<é>"}]')


async def test_a_templates_refusal_reaches_the_client(tokenizer: Tokenizer) -> None:
    strange = Chat(messages=[ChatMessage(role="pirate", content="arr")])
    with pytest.raises(InvalidRequest, match="chat: the model's chat template: no role pirate"):
        await tokenizer.encode(strange)


async def test_what_a_template_cannot_work_with_is_the_clients_error(tmp_path: Path) -> None:
    source = "{{ 'call ' + messages[0].tool_calls[0].name }}"
    tokenizer = Tokenizer.read(write_byte_model(tmp_path, chat_template=source), num_threads=1)
    calls = [{"name": 5}]  # not the text that the template takes for granted
    strange = Chat(messages=[ChatMessage(role="user", content="hi", tool_calls=calls)])
    with pytest.raises(InvalidRequest, match="chat: the model's chat template: can only concat"):
        await tokenizer.encode(strange)
    tokenizer.close()


async def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.read(write_byte_model(tmp_path, chat_template=None), num_threads=1)
    with pytest.raises(InvalidRequest, match="no chat template"):
        await tokenizer.encode(chat("hi"))
    tokenizer.close()


@pytest.mark.parametrize("where", ["file", "named"])
async def test_templates_are_found_where_models_keep_them(tmp_path: Path, where: str) -> None:
    write_byte_model(tmp_path, chat_template=None)
    source = "{{ bos_token }}{{ messages[0].content }}"
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(source)
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
        config = {"chat_template": named, "bos_token": {"content": "<bos>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if where == "file":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}))
    tokenizer = Tokenizer.read(tmp_path, num_threads=1)
    assert await tokenizer.encode(chat("hi")) == [BOS, *tokens_of("hi")]
    tokenizer.close()


async def test_a_template_cannot_leave_the_sandbox(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = Tokenizer.read(write_byte_model(tmp_path, chat_template=escape), num_threads=1)
    with pytest.raises(InvalidRequest, match="unsafe"):
        await tokenizer.encode(chat("hi"))
    tokenizer.close()


async def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.read(write_byte_model(tmp_path, chat_template="{{ '' }}"), num_threads=1)
    with pytest.raises(InvalidRequest, match="no tokens"):
        await tokenizer.encode(chat("hi"))
    tokenizer.close()


async def test_the_event_loop_goes_on_while_a_long_prompt_is_tokenized(
    tokenizer: Tokenizer,
) -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(turn())
    start_s = time.monotonic()
    ids = await tokenizer.encode("x" * 1_000_000)
    took_s = time.monotonic() - start_s
    ticking.cancel()
    assert len(ids) == 1_000_001
    assert turns > took_s / 0.05, "the loop stood still"
    assert threading.active_count() < 20


@pytest.mark.parametrize("as_chat", [False, True])
async def test_a_short_prompt_does_not_wait_for_long_ones(tmp_path: Path, as_chat: bool) -> None:
    template = "{{ messages[0].content }}"
    tokenizer = Tokenizer.read(write_byte_model(tmp_path, chat_template=template), num_threads=1)
    text = "x" * 1_000_000
    message = ChatMessage(role="user", content=text)
    prompt = Chat(messages=[message], num_bytes=len(text)) if as_chat else text
    long = [asyncio.ensure_future(tokenizer.encode(prompt)) for _ in range(4)]
    await asyncio.sleep(0)
    assert await tokenizer.encode("hi") == [BOS, *tokens_of("hi")]
    assert not long[1].done(), "one after another"
    await asyncio.gather(*long)
    tokenizer.close()


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTokenizer, match=r"tokenizer\.json"):
        Tokenizer.read(tmp_path, num_threads=1)
