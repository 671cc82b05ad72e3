"""What the services answer, and what transformers + peft answered."""

import json
import time
from typing import NamedTuple

from demo.paths import EXPECTED_FILE
from demo.tasks import MAX_ANSWER_TOKENS, make_prompt, right_answer
from lorry.client import Client, Request

FIRST_WORD = "serving"
SHOWN_DIFFERENCES = 5


class DemoFailed(Exception):
    """Something that the demo promises did not hold."""


class Answer(NamedTuple):
    token_ids: list[int]
    text: str


class Expected(NamedTuple):
    adapter: str  # id; empty = the base model
    prompt: str
    max_tokens: int
    answer: Answer

    @property
    def request(self) -> Request:
        return greedy(self.adapter, self.prompt, self.max_tokens)


def read_expected() -> list[Expected]:
    """The requests of expected.json."""
    return [
        Expected(
            each["adapter"],
            each["prompt"],
            each["max_tokens"],
            Answer(each["token_ids"], each["text"]),
        )
        for each in json.loads(EXPECTED_FILE.read_text())
    ]


def greedy(adapter: str, prompt: str, max_tokens: int) -> Request:
    return Request(prompt=prompt, adapter=adapter, max_tokens=max_tokens, temperature=0)


def compare(expected: list[Expected], answers: list[Answer]) -> None:
    """Raise DemoFailed for any token or text that transformers + peft did not give."""
    differences = [
        f"{each.adapter or 'base'} {each.prompt!r}: {answer}, not {each.answer}"
        for each, answer in zip(expected, answers, strict=True)
        if answer != each.answer
    ]
    if differences:
        shown = "\n".join(differences[:SHOWN_DIFFERENCES])
        raise DemoFailed(f"{len(differences)} of {len(expected)} answers differ:\n{shown}")


async def first_call(client: Client, adapter: str) -> float:
    """Seconds to the first token of an adapter's first request; raises for a wrong answer."""
    prompt = make_prompt(FIRST_WORD)
    began_s = time.monotonic()
    async with client.stream(greedy(adapter, prompt, MAX_ANSWER_TOKENS)) as stream:
        seconds = time.monotonic() - began_s
        text = "".join([chunk.text async for chunk in stream])
    if text != right_answer(adapter, prompt):
        raise DemoFailed(f"{adapter} answered {text!r} to {FIRST_WORD!r}")
    return seconds
