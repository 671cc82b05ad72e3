import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorry.router.detokenizer import Detokenizer, TokenTable, UnsupportedTokenizer
from tests.support.byte_model import (
    BOS,
    EOS,
    LONG,
    LONG_TEXT,
    NUM_TOKENS,
    byte_tokenizer,
    tokens_of,
)

BYTES = byte_tokenizer()
BYTE_TABLE = TokenTable.of_tokenizer(BYTES)


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: words with U+2581 for a space, and a token for each byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    words += ["▁the", "▁", "lo", "rry", "é", "▁▁", "\n"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


SENTENCEPIECE = sentencepiece_tokenizer()
SENTENCEPIECE_TABLE = TokenTable.of_tokenizer(SENTENCEPIECE)


def pieces_of(table: TokenTable, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(table)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    return [*pieces, detokenizer.flush()]


@given(st.lists(st.integers(0, NUM_TOKENS - 2), max_size=60))
def test_pieces_of_any_tokens_join_to_the_tokenizers_own_decoding(token_ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_TABLE, token_ids)) == BYTES.decode(token_ids)


@given(st.text(max_size=40))
def test_every_character_comes_out_with_its_last_byte(text: str) -> None:
    detokenizer = Detokenizer(BYTE_TABLE)
    for character in text:
        *others, last = tokens_of(character)
        assert [detokenizer.push(token_id) for token_id in others] == [""] * len(others)
        assert detokenizer.push(last) == character
    assert detokenizer.flush() == ""


def can_become_a_character(data: bytes) -> bool:
    """Whether some bytes after `data` make its last, unfinished part a character."""
    tails = [bytes([first]) + b"\x80" * more for first in range(0x80, 0xC0) for more in range(3)]
    num_broken = data.decode("utf-8", "replace").count("\ufffd")
    return any((data + t).decode("utf-8", "replace").count("\ufffd") < num_broken for t in tails)


# Without 0xED: codecs' decoder waits for one byte more than it must where that begins a surrogate.
@given(st.binary(max_size=30).map(lambda data: data.replace(b"\xed", b"\xee")))
def test_only_what_can_still_become_a_character_is_held_back(data: bytes) -> None:
    detokenizer = Detokenizer(BYTE_TABLE)
    emitted = ""
    for size in range(1, len(data) + 1):
        emitted += detokenizer.push(tokens_of(data[size - 1 : size])[0])
        whole = data[:size].decode("utf-8", "replace")
        assert emitted == (whole[:-1] if can_become_a_character(data[:size]) else whole)


@given(st.lists(st.sampled_from(["▁the", "▁", "lo", "rry", "é", "▁▁", "\n", "€", "𝄞"])))
def test_byte_fallback_tokens_join_to_text(words: list[str]) -> None:
    token_ids: list[int] = []
    for word in words:
        token_id = SENTENCEPIECE.token_to_id(word)
        token_ids += [3 + b for b in word.encode()] if token_id is None else [token_id]
    text = "".join(words).replace("▁", " ")
    assert "".join(pieces_of(SENTENCEPIECE_TABLE, token_ids)) == text
    assert SENTENCEPIECE.decode(token_ids) == text.removeprefix(" ")


def test_the_space_between_prompt_and_output_is_kept() -> None:
    token_id = SENTENCEPIECE.get_vocab()["▁the"]
    assert pieces_of(SENTENCEPIECE_TABLE, [token_id]) == [" the", ""]


def test_special_and_unknown_tokens_have_no_text() -> None:
    token_ids = [BOS, *tokens_of("a"), EOS, NUM_TOKENS, 10**6]
    assert pieces_of(BYTE_TABLE, token_ids) == ["", "a", "", "", "", ""]


def test_a_special_token_does_not_break_a_character() -> None:
    first, *rest = tokens_of("€")
    assert "".join(pieces_of(BYTE_TABLE, [first, EOS, *rest])) == "€"


def test_long_tokens_come_out_whole() -> None:
    assert pieces_of(BYTE_TABLE, [LONG])[0] == LONG_TEXT


def test_added_tokens_that_are_not_special_have_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool call>"])
    token_id = tokenizer.get_vocab()["<tool call>"]
    assert pieces_of(TokenTable.of_tokenizer(tokenizer), [token_id])[0] == "<tool call>"


def test_an_unknown_kind_of_decoder_is_refused_by_name() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedTokenizer, match="WordPiece"):
        TokenTable.of_tokenizer(tokenizer)


def test_a_missing_decoder_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedTokenizer):
        TokenTable.of_tokenizer(tokenizer)
