"""The pairs of prompt and answer that training reads; an endless seeded stream for each part."""

import random
from collections.abc import Iterator
from itertools import islice

from demo.tasks import ALL_TASKS, PROMPT_END, make_prompt, words

Pair = tuple[str, str]  # a prompt and its answer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
# Code points of one to four bytes of UTF-8; surrogates have no bytes.
CHARACTER_RANGES = [(0x20, 0x7E), (0x80, 0x7FF), (0x800, 0xD7FF), (0x1F300, 0x1FAFF)]
POOL_BATCHES = 16


def copies(seed: int) -> Iterator[Pair]:
    """Words, and strings of any letters, digits and other characters so that each byte is known."""
    rng, stream = random.Random(seed), words("train", seed)
    while True:
        kind = rng.random()
        if kind < 0.6:
            text = next(stream)
        elif kind < 0.9:
            text = "".join(rng.choices(LETTERS, k=rng.randint(1, 24)))
        else:
            text = "".join(any_character(rng) for _ in range(rng.randint(1, 8)))
        yield make_prompt(text), text


def any_character(rng: random.Random) -> str:
    return chr(rng.randint(*rng.choice(CHARACTER_RANGES))).replace(PROMPT_END, "<")


def answers(name: str, seed: int) -> Iterator[Pair]:
    task = ALL_TASKS[name]
    return ((make_prompt(word), task(word)) for word in words("train", seed))


def batches(pairs: Iterator[Pair], size: int, seed: int) -> Iterator[list[Pair]]:
    """Batches of pairs of like length, in random order: half the padding of mixed ones."""
    rng = random.Random(seed)
    while True:
        pool = sorted(islice(pairs, POOL_BATCHES * size), key=lambda pair: len(pair[0] + pair[1]))
        chunks = [pool[at : at + size] for at in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from chunks
