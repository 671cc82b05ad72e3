"""Which adapters there are, what each may hold, and the tokens that every request must have."""

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from demo import tasks
from lorry.client import Client, Request

WORDS = ("lorry", "transport", "banana")
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.3, "top_p": 0.95, "seed": 6, "repetition_penalty": 1.2},
)
SOURCES = ("double-letters", "reverse", "rot13", "sort-letters")
ALPHAS = (1.0, 1.5)  # times an adapter's own
NUM_TOKENS = 80
STABLE = tuple(f"stable-{number}" for number in range(4))
CHANGING = tuple(f"changing-{number}" for number in range(6))
BASE = ""


class Question(NamedTuple):
    """What is asked of a content; its answer is the same whenever and wherever it is asked."""

    word: str
    sampling: int  # index in SAMPLINGS

    def request(self, adapter: str, **fields: Any) -> Request:
        defaults: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        return Request(
            prompt=tasks.make_prompt(self.word),
            adapter=adapter,
            **(SAMPLINGS[self.sampling] | defaults | fields),
        )


QUESTIONS = [Question(word, sampling) for word in WORDS for sampling in range(len(SAMPLINGS))]


@dataclass
class Catalogue:
    """Contents are directories; the ids of adapters point to them, some of them ever anew."""

    contents: Sequence[Path]
    versions: dict[str, str] = field(default_factory=dict)  # content's name, by version
    answers: dict[tuple[str, Question], list[int]] = field(default_factory=dict)
    current: dict[str, str | None] = field(default_factory=dict)  # content's name, by id; None: no
    ever: dict[str, set[str]] = field(default_factory=dict)  # contents' names, by id

    @classmethod
    def create(cls, directory: Path, demo: Path) -> "Catalogue":
        """Some of the demo's adapters, each with two alphas."""
        return cls(list(_write_contents(directory, demo)))

    def content(self, name: str) -> Path:
        [found] = [path for path in self.contents if path.name == name]
        return found

    def note(self, adapter_id: str, content: str | None) -> None:
        """From now on the id points to `content`."""
        self.current[adapter_id] = content
        if content is not None:
            self.may_become(adapter_id, content)

    def may_become(self, adapter_id: str, content: str) -> None:
        """A push has begun."""
        self.ever.setdefault(adapter_id, set()).add(content)

    async def ask_everything(self, client: Client, random: Random) -> None:
        """Publish each content and learn its answers, before anything disturbs them."""
        ids = {content.name: f"only-{number}" for number, content in enumerate(self.contents)}
        for content in self.contents:
            adapter = await client.adapters.push(content, adapter_id=ids[content.name])
            self.versions[adapter.version] = content.name
        asked = [self._ask(client, content, adapter_id) for content, adapter_id in ids.items()]
        await asyncio.gather(*asked, self._ask(client, BASE, BASE))
        for adapter_id in ids.values():
            await client.adapters.delete(adapter_id)
        for adapter_id in (*STABLE, *CHANGING):
            content = random.choice(self.contents)
            await client.adapters.push(content, adapter_id=adapter_id)
            self.note(adapter_id, content.name)

    async def _ask(self, client: Client, content: str, adapter_id: str) -> None:
        for question in QUESTIONS:
            answer = await client.generate(question.request(adapter_id))
            assert len(answer.token_ids) == NUM_TOKENS
            assert self.versions.get(answer.completion.version, BASE) == content
            self.answers[content, question] = list(answer.token_ids)

    def is_answer(
        self, adapter_id: str, question: Question, token_ids: list[int], version: str | None
    ) -> bool:
        """Whether they begin the answer of the version, or of one that the id may have had."""
        if version is None:
            contents = {BASE} if adapter_id == BASE else self.ever[adapter_id]
        else:
            contents = {self.versions[version] if version else BASE}
            if adapter_id != BASE and not contents <= self.ever[adapter_id]:
                return False
        answers = [self.answers[content, question] for content in contents]
        return any(answer[: len(token_ids)] == token_ids for answer in answers)


def _write_contents(directory: Path, demo: Path) -> Iterator[Path]:
    for source in SOURCES:
        for alpha in ALPHAS:
            content = directory / f"{source}-{alpha}"
            shutil.copytree(demo / source, content)
            file = content / "adapter_config.json"
            config = json.loads(file.read_text())
            config["lora_alpha"] *= alpha
            file.write_text(json.dumps(config))
            yield content
