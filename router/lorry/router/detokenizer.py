"""Text from output tokens, one at a time.

Every token id stands for fixed bytes, so that a token costs one table look-up: text that is
complete UTF-8 comes out at once, an incomplete character waits for its other bytes. Bytes that can
never become a character turn into one U+FFFD for each broken sequence. Special tokens have no text.

The text is what the tokens add to the prompt's: a decoder's stripping of a leading space, meant for
the beginning of a whole text, does not apply.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class UnsupportedTokenizer(ValueError):
    """The tokenizer's decoder is not one whose tokens stand for fixed bytes."""


class TokenTable(NamedTuple):
    """What each token id stands for; ids beyond the tables have no text."""

    token_bytes: list[bytes]
    texts: list[str | None]  # None where the bytes are not complete UTF-8 by themselves

    @classmethod
    def of(cls, token_bytes: Iterable[bytes]) -> "TokenTable":
        by_id = list(token_bytes)
        return cls(by_id, [_text_or_none(data) for data in by_id])

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> "TokenTable":
        """Raises UnsupportedTokenizer that names the decoder."""
        to_bytes = _bytes_of_token(json.loads(tokenizer.to_str())["decoder"])
        added = tokenizer.get_added_tokens_decoder()
        size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        tokens = [
            None
            if token_id in added and added[token_id].special
            else tokenizer.id_to_token(token_id)
            for token_id in range(size)
        ]
        return cls.of(b"" if token is None else to_bytes(token) for token in tokens)


class Detokenizer:
    """The text of one output. `push` each token, then `flush` once."""

    __slots__ = ("_decoder", "_pending", "_table")

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._decoder = _utf8_decoder("replace")
        self._pending = False  # whether the decoder holds part of a character

    def push(self, token_id: int) -> str:
        """The text that is certain now."""
        token_bytes, texts = self._table
        if token_id >= len(texts):
            return ""
        text = texts[token_id]
        if text is not None and not self._pending:
            return text
        text = self._decoder.decode(token_bytes[token_id])
        self._pending = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What an incomplete last character leaves."""
        return self._decoder.decode(b"", final=True)


def _text_or_none(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _bytes_of_token(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _with_replacements(steps)
    raise UnsupportedTokenizer(
        f"the tokenizer's decoder {kinds} is not supported; ByteLevel, or a sequence of Replace, "
        "ByteFallback, Fuse and Strip is"
    )


def _byte_level(token: str) -> bytes:
    """Tokens spell bytes as printable characters; an added token may hold others, as themselves."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _with_replacements(steps: list[Mapping[str, Any]]) -> Callable[[str], bytes]:
    """Tokens are text after some replacements; ``<0x0A>`` stands for the byte 10."""
    replacements = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
    byte_tokens = (
        {f"<0x{value:02X}>": bytes([value]) for value in range(256)}
        if any(step["type"] == "ByteFallback" for step in steps)
        else {}
    )

    def to_bytes(token: str) -> bytes:
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        return byte_tokens.get(token) or token.encode()

    return to_bytes


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling: printable Latin-1 characters are themselves, other bytes follow U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    spelling = {chr(value): value for value in printable}
    return spelling | {chr(0x100 + index): value for index, value in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
