import asyncio

import pytest

from lorry.router.detokenizer import TokenTable
from lorry.router.generation import Chunk, PromptLogprobs, TokenLogprobs
from lorry.router.output import MAX_CHUNK_LOGPROBS, Output
from lorry.router.text_stream import TextStream
from lorry.rpc.errors import NoWorker
from tests.router.test_translation import completion
from tests.support.byte_model import byte_tokenizer, tokens_of

TABLE = TokenTable.of_tokenizer(byte_tokenizer())


def output(*, streaming: bool = True, **text) -> Output:
    return Output(TextStream(TABLE, **text), streaming=streaming)


def push(to: Output, text: str) -> None:
    for token_id in tokens_of(text):
        to.push(token_id)


async def test_what_waits_goes_out_as_one_chunk() -> None:
    stream = output()
    push(stream, "ab")
    push(stream, "c")
    assert await stream.next_chunk() == Chunk(tokens_of("abc"), "abc")
    assert stream.num_sent == 3


async def test_logprobs_go_out_with_their_tokens() -> None:
    stream = output()
    for index, token_id in enumerate(tokens_of("ab")):
        stream.push(token_id, TokenLogprobs(-index, [5], [-0.5]))
    chunk = await stream.next_chunk()
    rows = (TokenLogprobs(0, [5], [-0.5]), TokenLogprobs(-1, [5], [-0.5]))
    assert chunk == Chunk(tokens_of("ab"), "ab", rows)


async def test_a_chunk_of_many_logprobs_is_cut() -> None:
    stream = output()
    num_tokens = 2 * MAX_CHUNK_LOGPROBS + 3
    for index in range(num_tokens):
        stream.push(tokens_of("a")[0], TokenLogprobs(-index))
    stream.complete(completion())
    chunks = [await stream.next_chunk() for _ in range(3)]
    assert await stream.next_chunk() is None
    sizes = [(len(chunk.token_ids), len(chunk.logprobs)) for chunk in chunks if chunk]
    assert sizes == [(MAX_CHUNK_LOGPROBS,) * 2, (MAX_CHUNK_LOGPROBS,) * 2, (3, 3)]
    assert "".join(chunk.text for chunk in chunks if chunk) == "a" * num_tokens
    assert [row.logprob for chunk in chunks if chunk for row in chunk.logprobs] == [
        -index for index in range(num_tokens)
    ]
    assert stream.num_sent == num_tokens


PROMPT = [
    PromptLogprobs(1, [5], [-1], [8, 9], [-0.5, -2]),
    PromptLogprobs(2, [6, 7], [-2, -3], [8, 9, 10, 11], [-0.5, -2, -0.25, -3]),
]


async def test_logprobs_of_the_prompt_go_out_before_tokens() -> None:
    stream = output()
    for part in PROMPT:
        stream.push_prompt(part)
    assert stream.num_unsent == 3
    push(stream, "a")
    for part in PROMPT:
        assert await stream.next_chunk() == Chunk([], "", prompt=(part,))
    assert (stream.num_sent, stream.has_sent) == (0, True)
    assert await stream.next_chunk() == Chunk(tokens_of("a"), "a")
    assert stream.num_unsent == 0


async def test_a_whole_answer_holds_the_logprobs_of_its_prompt() -> None:
    stream = output(streaming=False)
    for part in PROMPT:
        stream.push_prompt(part)
    push(stream, "a")
    stream.complete(completion())
    assert await stream.next_chunk() == Chunk(tokens_of("a"), "a", (), tuple(PROMPT))
    assert await stream.next_chunk() is None


def test_what_follows_the_first_tokens_has_its_own_alternatives() -> None:
    whole = PromptLogprobs(2, [6, 7], [-2, -3], [8, 9, 10, 11], [-0.5, -2, -0.25, -3])
    assert whole.after(0) == whole
    assert whole.after(1) == PromptLogprobs(3, [7], [-3], [10, 11], [-0.25, -3])
    assert not whole.after(2).logprobs
    assert not whole.after(9).logprobs


async def test_a_waiting_client_is_woken() -> None:
    stream = output()
    waiting = asyncio.ensure_future(stream.next_chunk())
    await asyncio.sleep(0)
    push(stream, "a")
    assert await waiting == Chunk(tokens_of("a"), "a")


async def test_tokens_go_out_even_while_their_text_is_held_back() -> None:
    stream = output(stop_strings=["END"])
    push(stream, "E")
    assert await stream.next_chunk() == Chunk(tokens_of("E"), "")
    stream.flush()
    stream.complete(completion())
    assert await stream.next_chunk() == Chunk([], "E")
    assert await stream.next_chunk() is None


async def test_all_chunks_come_before_the_end() -> None:
    stream = output()
    push(stream, "a")
    stream.complete(completion(request_id="r-9"))
    assert await stream.next_chunk() == Chunk(tokens_of("a"), "a")
    assert await stream.next_chunk() is None
    assert stream.completed.request_id == "r-9"


async def test_without_streaming_there_is_one_chunk_at_the_end() -> None:
    stream = output(streaming=False)
    waiting = asyncio.ensure_future(stream.next_chunk())
    push(stream, "abc")
    await asyncio.sleep(0)
    assert not waiting.done()
    assert stream.num_unsent == 0, "nobody is slow"
    stream.complete(completion())
    assert await waiting == Chunk(tokens_of("abc"), "abc")


async def test_an_error_comes_at_once_and_drops_what_was_not_sent() -> None:
    """So that the number of sent tokens in the error stays true."""
    stream = output()
    push(stream, "a")
    stream.push_prompt(PROMPT[0])
    stream.fail(NoWorker("gone"))
    assert stream.num_unsent == 0, "it would be held for as long as the client does not read"
    with pytest.raises(NoWorker):
        await stream.next_chunk()
    assert stream.num_sent == 0


async def test_an_error_wakes_a_waiting_client() -> None:
    stream = output()
    waiting = asyncio.ensure_future(stream.next_chunk())
    await asyncio.sleep(0)
    stream.fail(NoWorker("gone"))
    with pytest.raises(NoWorker):
        await waiting


async def test_a_cancelled_wait_leaves_the_output_usable() -> None:
    stream = output()
    waiting = asyncio.ensure_future(stream.next_chunk())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    push(stream, "a")
    assert await stream.next_chunk() == Chunk(tokens_of("a"), "a")


async def test_it_tells_since_when_a_chunk_is_being_sent() -> None:
    stream = output()
    push(stream, "a")
    assert stream.taken_s is None
    await stream.next_chunk()
    assert stream.taken_s is not None
    waiting = asyncio.ensure_future(stream.next_chunk())
    await asyncio.sleep(0)
    assert stream.taken_s is None, "the client is waiting for us, not we for it"
    waiting.cancel()
