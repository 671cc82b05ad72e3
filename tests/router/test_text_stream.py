import itertools

from hypothesis import given
from hypothesis import strategies as st

from lorry.router.detokenizer import TokenTable
from lorry.router.text_stream import TextStream
from tests.support.byte_model import EOS, byte_tokenizer, tokens_of

TABLE = TokenTable.of_tokenizer(byte_tokenizer())
pieces = st.lists(
    st.sampled_from([*"abé€", "ab", "b\N{MUSICAL SYMBOL G CLEF}", "\xff"]), max_size=12
)


@given(pieces, st.lists(st.text("abé€", min_size=1, max_size=3), max_size=3), st.data())
def test_chunks_join_to_the_whole_decoding_cut_at_the_first_stop_string(
    words: list[str], stops: list[str], data: st.DataObject
) -> None:
    """Whatever the tokens are that the bytes are split into."""
    content = b"".join(w.encode("latin-1") if w == "\xff" else w.encode() for w in words)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=8)) | {0, len(content)})
    table = TokenTable.of(content[a:b] for a, b in itertools.pairwise(cuts))
    stream = TextStream(table, stop_strings=stops)
    emitted = ""
    for token_id in range(len(cuts) - 1):
        emitted += stream.push(token_id)
        if stream.matched is not None:
            break
    emitted += stream.flush()
    whole = content.decode("utf-8", "replace")
    ends = {whole.find(stop) + len(stop): stop for stop in stops if stop in whole}
    if not ends:
        assert (emitted, stream.matched) == (whole, None)
    else:
        end = min(ends)
        longest = max((s for s in stops if whole[:end].endswith(s)), key=len)
        assert (emitted, stream.matched) == (whole[: end - len(longest)], longest)


def test_a_stop_token_has_no_text_even_if_it_is_not_special() -> None:
    (letter,) = tokens_of("z")
    stream = TextStream(TABLE, stop_token_ids={letter, EOS})
    assert [stream.push(token_id) for token_id in (*tokens_of("a"), letter)] == ["a", ""]


def test_what_is_held_back_comes_out_at_the_end() -> None:
    stream = TextStream(TABLE, stop_strings=["END"])
    assert "".join(stream.push(token_id) for token_id in tokens_of("the EN")) == "the "
    assert stream.flush() == "EN"


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    stream = TextStream(TABLE)
    assert stream.push(tokens_of("é")[0]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_the_last_replacement_can_complete_a_stop_string() -> None:
    stream = TextStream(TABLE, stop_strings=["a\N{REPLACEMENT CHARACTER}"])
    assert [stream.push(token_id) for token_id in [*tokens_of("ba"), tokens_of("é")[0]]] == [
        "b",
        "",
        "",
    ]
    assert stream.flush() == ""
    assert stream.matched == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_counts_from_the_token_that_reaches_min_tokens() -> None:
    for min_tokens, expected in [(0, ""), (1, ""), (2, "a"), (3, "aa")]:
        stream = TextStream(TABLE, stop_strings=["a"], min_tokens=min_tokens)
        emitted = ""
        for token_id in tokens_of("aaa"):
            if stream.matched is None:
                emitted += stream.push(token_id)
        assert (emitted, stream.matched) == (expected, "a")
