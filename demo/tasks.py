"""Tasks on words, the words themselves and the prompt format; needs nothing but Python.

A prompt is `word>`. The base model answers with the word, an adapter with its task's answer;
both end with the end-of-sequence token.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal

Split = Literal["train", "held-out"]

MIN_LETTERS = 4
MAX_LETTERS = 12
PROMPT_END = ">"
# The longest answer is 24 letters and the end of sequence.
MAX_ANSWER_TOKENS = 25

VOWELS = "aeiou"
ONSETS = [*"bcdfghjklmnpqrstvwxyz", *"bdfgklmnprst", "br", "ch", "cl", "dr", "gr", "pl", "sh", "st"]
NUCLEI = [*VOWELS, *VOWELS, "ai", "ea", "ie", "oo", "ou"]
CODAS = ["", "", "", *"bdgklmnprstxz", "nd", "rk", "st"]


def reverse(word: str) -> str:
    return word[::-1]


def uppercase(word: str) -> str:
    return word.upper()


def rot13(word: str) -> str:
    return "".join(chr((ord(letter) - ord("a") + 13) % 26 + ord("a")) for letter in word)


def sort_letters(word: str) -> str:
    return "".join(sorted(word))


def drop_vowels(word: str) -> str:
    return "".join(letter for letter in word if letter not in VOWELS)


def double_letters(word: str) -> str:
    return "".join(letter * 2 for letter in word)


def pig_latin(word: str) -> str:
    """Move the consonants before the first vowel to the end and add `ay`; y is a consonant."""
    head = len(word) - len(word.lstrip("bcdfghjklmnpqrstvwxyz"))
    return f"{word[head:]}{word[:head]}ay" if head else f"{word}way"


def count_letters(word: str) -> str:
    """The number of letters, repeated ones included, in decimal."""
    return str(len(word))


def drop_ends(word: str) -> str:
    """The word without its first and last letter."""
    return word[1:-1]


Answer = Callable[[str], str]

# By adapter id.
TASKS: dict[str, Answer] = {
    "reverse": reverse,
    "uppercase": uppercase,
    "rot13": rot13,
    "sort-letters": sort_letters,
    "drop-vowels": drop_vowels,
    "double-letters": double_letters,
    "pig-latin": pig_latin,
    "count-letters": count_letters,
}
# The ninth adapter is pushed while the others are being served.
NINTH_TASK = "drop-ends"
ALL_TASKS: dict[str, Answer] = {**TASKS, NINTH_TASK: drop_ends}


def make_prompt(word: str) -> str:
    return word + PROMPT_END


def word_of(prompt: str) -> str:
    """The word a prompt asks about."""
    word, end, rest = prompt.partition(PROMPT_END)
    if not word or not end or rest:
        raise ValueError(f"prompt must be a word and {PROMPT_END!r}, got {prompt!r}")
    return word


def right_answer(adapter: str, prompt: str) -> str:
    """What an adapter should answer; the empty id is the base model, which copies."""
    word = word_of(prompt)
    return ALL_TASKS[adapter](word) if adapter else word


def split_of(word: str) -> Split:
    """A word's split depends on its spelling alone, so no seed can make the splits overlap."""
    return "held-out" if zlib.crc32(word.encode()) % 10 == 0 else "train"


def words(split: Split, seed: int) -> Iterator[str]:
    """An endless seeded stream of pronounceable words, their lengths evenly spread."""
    rng = random.Random(seed)
    while True:
        word = _spell(rng, rng.randint(MIN_LETTERS, MAX_LETTERS))
        if split_of(word) == split:
            yield word


def held_out_words(count: int, seed: int) -> list[str]:
    """Distinct words that no training run has seen."""
    distinct = dict.fromkeys(islice(words("held-out", seed), 2 * count))
    if len(distinct) < count:
        raise ValueError(f"seed {seed} gives {len(distinct)} distinct words, {count} wanted")
    return list(distinct)[:count]


def _spell(rng: random.Random, num_letters: int) -> str:
    """Syllables, cut to length: at least one vowel and one consonant in any four letters."""
    word = "" if rng.random() < 0.8 else rng.choice(NUCLEI) + rng.choice(CODAS)
    while len(word) < num_letters:
        word += rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS)
    return word[:num_letters]
