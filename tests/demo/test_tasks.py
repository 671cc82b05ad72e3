import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from demo import tasks
from demo.tasks import ALL_TASKS, TASKS, VOWELS

REPO = Path(__file__).parents[2]

EXAMPLES = {
    "reverse": "ananab",
    "uppercase": "BANANA",
    "rot13": "onanan",
    "sort-letters": "aaabnn",
    "drop-vowels": "bnn",
    "double-letters": "bbaannaannaa",
    "pig-latin": "ananabay",
    "count-letters": "6",
    "drop-ends": "anan",
}


def some_words(split: tasks.Split, seed: int = 0, count: int = 5000) -> list[str]:
    return list(islice(tasks.words(split, seed), count))


@pytest.mark.parametrize("name", ALL_TASKS)
def test_each_task_answers_banana(name):
    assert ALL_TASKS[name]("banana") == EXAMPLES[name]


def test_there_are_eight_tasks_and_a_ninth():
    assert len(TASKS) == 8
    assert set(ALL_TASKS) - set(TASKS) == {tasks.NINTH_TASK}


def test_reverse_and_rot13_undo_themselves():
    for word in some_words("train", count=500):
        assert tasks.reverse(tasks.reverse(word)) == word
        assert tasks.rot13(tasks.rot13(word)) == word


@pytest.mark.parametrize(
    ("word", "answer"),
    [("strong", "ongstray"), ("apple", "appleway"), ("yellow", "ellowyay"), ("quick", "uickqay")],
)
def test_pig_latin_moves_the_leading_consonants(word, answer):
    assert tasks.pig_latin(word) == answer


def test_splits_share_no_word():
    assert not set(some_words("train")) & set(some_words("held-out", seed=1))


def test_words_are_the_same_for_the_same_seed_only():
    assert some_words("train", seed=3) == some_words("train", seed=3)
    assert some_words("train", seed=3) != some_words("train", seed=4)


def test_words_are_lower_case_letters_of_every_length_with_a_vowel_and_a_consonant():
    words = some_words("train") + some_words("held-out")
    assert {len(word) for word in words} == set(range(tasks.MIN_LETTERS, tasks.MAX_LETTERS + 1))
    assert all(word.isascii() and word.islower() and word.isalpha() for word in words)
    assert all(0 < sum(letter in VOWELS for letter in word) < len(word) for word in words)


def test_held_out_words_are_distinct():
    words = tasks.held_out_words(300, seed=5)
    assert len(set(words)) == 300
    assert all(tasks.split_of(word) == "held-out" for word in words)


def test_answers_and_their_end_fit_the_token_limit():
    for word in some_words("train", count=500):
        for task in ALL_TASKS.values():
            assert len(task(word)) + 1 <= tasks.MAX_ANSWER_TOKENS


def test_prompts_round_trip():
    assert tasks.word_of(tasks.make_prompt("banana")) == "banana"
    assert tasks.right_answer("reverse", "banana>") == "ananab"
    assert tasks.right_answer("", "banana>") == "banana"


@pytest.mark.parametrize("prompt", ["", "banana", ">", "a>b", "a>>"])
def test_anything_but_a_word_and_the_end_is_no_prompt(prompt):
    with pytest.raises(ValueError, match="prompt must be"):
        tasks.word_of(prompt)


def test_tasks_need_no_torch():
    code = "import demo.tasks, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
