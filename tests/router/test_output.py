import asyncio

import pytest

from lorry.router.detokenizer import TokenTable
from lorry.router.generation import Chunk
from lorry.router.output import Output
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
    stream.fail(NoWorker("gone"))
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
