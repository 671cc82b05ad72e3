"""Requests of several adapters, answered by transformers + peft, that an engine is to equal."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.engines import EngineHarness
from tests.support.models import Greedy, Reference, first_difference, make_adapter, make_model

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*QKVO, "gate_proj", "up_proj", "down_proj"]
MODELS: dict[str, dict[str, Any]] = {
    "gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mha-untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "r1": {"r": 1, "lora_alpha": 4, "target_modules": ALL},
    "r3": {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]},
    "r8": {"r": 8, "lora_alpha": 16, "target_modules": QKVO},
    "r16-rslora": {"r": 16, "lora_alpha": 16, "target_modules": ALL, "use_rslora": True},
    "r64": {"r": 64, "lora_alpha": 32, "target_modules": ["down_proj", "gate_proj", "k_proj"]},
    "r256": {"r": 256, "lora_alpha": 256, "target_modules": QKVO},
    "pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 12, r"layers\.1\.mlp\.up_proj": 1},
    },
}
LENGTHS = [1, 2, 15, 16, 17, 33, 100, 257, 600]
MAX_TOKENS = 36


class AdaptedModel:
    """A model, and adapters of many ranks and targets; None stands for no adapter."""

    def __init__(
        self,
        directory: Path,
        *,
        model_type: str = "llama",
        adapters: Iterable[str] = ADAPTERS,
        **model_fields: Any,
    ) -> None:
        self.model = make_model(directory / "model", model_type=model_type, **model_fields)
        self.adapters = [None] + [
            make_adapter(directory / name, self.model, seed=seed, **ADAPTERS[name])
            for seed, name in enumerate(adapters)
        ]


class World(AdaptedModel):
    """The reference's answers to a fixed set of requests, too."""

    def __init__(
        self,
        directory: Path,
        model_fields: dict[str, Any],
        *,
        adapters: Iterable[str] = ADAPTERS,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        super().__init__(directory, adapters=adapters, **model_fields)
        self._lengths = lengths
        reference = Reference(self.model)
        self.requests: list[tuple[list[int], Path | None, Greedy]] = [
            (prompt, adapter, reference.greedy(prompt, adapter, MAX_TOKENS))
            for prompt, adapter in self._prompts(np.random.default_rng(0))
        ]

    def _prompts(self, random: np.random.Generator) -> Iterator[tuple[list[int], Path | None]]:
        for index, adapter in enumerate(itertools.chain(self.adapters * 2)):
            length = self._lengths[index % len(self._lengths)]
            yield random.integers(3, 320, length).tolist(), adapter


class PrefixWorld(World):
    """Prompts that begin alike, also where their adapters differ."""

    def _prompts(self, random: np.random.Generator) -> Iterator[tuple[list[int], Path | None]]:
        common = random.integers(3, 320, 70).tolist()
        for adapter in self.adapters:
            yield common, adapter
            yield common[:48], adapter
            yield common[:49] + random.integers(3, 320, 40).tolist(), adapter


def check_answers(
    world: World, harness: EngineHarness, *, copies: int = 1, longest: int = max(LENGTHS)
) -> None:
    """Send each request with a prompt up to `longest` `copies` times at once; compare answers.

    One sequence of a thousand may differ, from where the reference's own choice was a coin's.
    """
    requests = [request for request in world.requests if len(request[0]) <= longest] * copies
    numbers = [harness.submit(prompt, adapter, MAX_TOKENS) for prompt, adapter, _ in requests]
    harness.run()
    excused = 0
    for number, (prompt, adapter, expected) in zip(numbers, requests, strict=True):
        actual = harness.tokens[number]
        assert first_difference(expected, actual) is None, (
            f"{adapter} after {len(prompt)} tokens: {actual}, not {expected.token_ids}"
        )
        assert harness.finished[number].failure is None
        excused += actual != expected.token_ids
    assert excused <= len(requests) // 1000


def largest_adapter_pages(models: AdaptedModel, tmp_path: Path) -> int:
    harness = EngineHarness(models.model, tmp_path, pool_pages=1)
    return max(harness.image_pages(adapter) for adapter in models.adapters if adapter)
