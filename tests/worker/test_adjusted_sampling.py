"""Penalties, logit biases and least numbers of tokens, against transformers + peft."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.worker.sequences import MAX_LOGIT_BIASES, MAX_STOP_IDS
from tests.support.adjusted_draws import drawn_adjusted
from tests.support.engines import EngineHarness
from tests.support.models import Reference, make_adapter, make_llama

MAX_TOKENS = 24
PROMPT = [5, 6, 7, 11, 5, 5]
VOCABULARY = 320
BIASES = {token_id: (token_id % 7 - 3) / 2 for token_id in range(MAX_LOGIT_BIASES)}
FIELDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "temperature": 1.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.5, "temperature": 0.9},
    {"logit_bias": BIASES},
    {"logit_bias": {9: 100.0}, "frequency_penalty": 2.0},
    {
        "repetition_penalty": 1.7,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 2.5, 319: 4.0, 17: -100.0},
        "temperature": 1.4,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
    },
    {"stop_token_ids": list(range(100, 100 + MAX_STOP_IDS)), "min_tokens": MAX_TOKENS},
    {"stop_token_ids": [9], "min_tokens": 6, "logit_bias": {9: 100.0}},
    {"temperature": 1.0, "top_k": 5},
    {},
]


class World:
    def __init__(self, directory: Path) -> None:
        self.model = make_llama(directory / "model", num_hidden_layers=2, vocab_size=VOCABULARY)
        fields: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "down_proj"]}
        self.adapter = make_adapter(directory / "adapter", self.model, seed=1, **fields)
        self.reference = Reference(self.model)
        self.adapters = (None, self.adapter)

    def logits(self, prompt: list[int], output: list[int], adapter: Path | None) -> torch.Tensor:
        """What each token of `output` was drawn from."""
        logits = self.reference.logits([*prompt, *output], adapter)
        return logits[len(prompt) - 1 : -1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def cases(world: World) -> Iterator[tuple[dict[str, Any], Path | None, int]]:
    for index, fields in enumerate(FIELDS):
        yield {"stop_token_ids": []} | fields, world.adapters[index % 2], 1000 + index


def submit_all(harness: EngineHarness, world: World, max_tokens: int = MAX_TOKENS) -> list[int]:
    return [
        harness.submit(PROMPT, adapter, max_tokens, seed=seed, **fields)
        for fields, adapter, seed in cases(world)
    ]


def check_all(harness: EngineHarness, world: World, numbers: list[int]) -> None:
    for number, (fields, adapter, seed) in zip(numbers, cases(world), strict=True):
        check(world, harness.tokens[number], fields, adapter, seed)


def check(
    world: World,
    tokens: list[int],
    fields: dict[str, Any],
    adapter: Path | None,
    seed: int,
    prompt: list[int] = PROMPT,
) -> None:
    logits = world.logits(prompt, tokens, adapter)
    assert tokens == drawn_adjusted(logits, fields, prompt, tokens, seed), fields


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_one_batch_of_all_adjustments_draws_what_transformers_leaves(
    world: World, tmp_path: Path, max_in_flight: int
) -> None:
    harness = EngineHarness(world.model, tmp_path)
    runner: Any = harness.engine.runner
    runner.max_in_flight = max_in_flight
    numbers = submit_all(harness, world)
    harness.run()
    check_all(harness, world, numbers)
    plain = harness.tokens[numbers[-1]]
    for number in (numbers[0], numbers[2], numbers[3], numbers[5], numbers[6]):
        assert harness.tokens[number] != plain
    assert harness.tokens[numbers[9]][6:] == [9], "a favoured stop token comes as soon as it may"


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_small_chunks_and_preemption_change_nothing(
    world: World, tmp_path: Path, max_in_flight: int
) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=12, max_running=12, pool_pages=23)
    runner: Any = harness.engine.runner
    runner.max_in_flight = max_in_flight
    numbers = submit_all(harness, world, 60)
    harness.run()
    assert harness.engine.status().preemptions > 0
    check_all(harness, world, numbers)


@pytest.mark.parametrize("index", range(len(FIELDS)))
def test_a_request_draws_alone_what_it_draws_in_a_crowd(
    world: World, tmp_path: Path, index: int
) -> None:
    harness = EngineHarness(world.model, tmp_path)
    fields, adapter, seed = list(cases(world))[index]
    number = harness.submit(PROMPT, adapter, MAX_TOKENS, seed=seed, **fields)
    harness.run()
    check(world, harness.tokens[number], fields, adapter, seed)


def test_tokens_that_were_output_elsewhere_count_as_output(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path)
    whole = submit_all(harness, world)
    harness.run()
    for number, (fields, adapter, seed) in zip(whole, cases(world), strict=True):
        tokens = harness.tokens[number]
        for done in (1, len(tokens) - 1):
            resumed = harness.submit(
                [*PROMPT, *tokens[:done]],
                adapter,
                MAX_TOKENS,
                generated_tokens=done,
                seed=seed,
                **fields,
            )
            harness.run()
            assert harness.tokens[resumed] == tokens[done:], fields


def test_tokens_of_a_prompt_in_the_prefix_cache_count(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path)
    prompt = PROMPT * 8
    harness.submit(prompt, None, 4, stop_token_ids=[])
    harness.run()
    for fields in FIELDS[:2]:
        whole = {"stop_token_ids": []} | fields
        number = harness.submit(prompt, None, MAX_TOKENS, seed=5, **whole)
        harness.run()
        assert harness.finished[number].cached_tokens > 0
        check(world, harness.tokens[number], whole, None, 5, prompt)


def test_a_row_of_the_table_forgets_whose_it_was(world: World, tmp_path: Path) -> None:
    """One sequence at a time, so that all have the same row, each with other adjustments."""
    harness = EngineHarness(world.model, tmp_path, max_running=1)
    numbers = submit_all(harness, world) + submit_all(harness, world)
    harness.run()
    check_all(harness, world, numbers[: len(FIELDS)])
    check_all(harness, world, numbers[len(FIELDS) :])


def test_repetition_is_of_prompt_and_output_but_presence_and_frequency_of_output_only(
    world: World, tmp_path: Path
) -> None:
    harness = EngineHarness(world.model, tmp_path)
    free = harness.submit(PROMPT, None, 1, stop_token_ids=[])
    harness.run()
    (first,) = harness.tokens[free]
    prompt = [*PROMPT[:-1], first, PROMPT[-1]]
    for name, value in (("presence_penalty", 2.0), ("frequency_penalty", 2.0)):
        plain = harness.submit(prompt, None, 1, stop_token_ids=[])
        number = harness.submit(prompt, None, 1, stop_token_ids=[], **{name: value})
        harness.run()
        assert harness.tokens[number] == harness.tokens[plain]
    logits = world.logits(prompt, [0], None)
    number = harness.submit(prompt, None, 1, stop_token_ids=[], repetition_penalty=10.0)
    harness.run()
    fields = {"repetition_penalty": 10.0}
    assert harness.tokens[number] == drawn_adjusted(logits, fields, prompt, [0], 0)


def test_logprobs_are_raw_whatever_is_adjusted(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path)
    for fields, adapter, seed in cases(world):
        number = harness.submit(PROMPT, adapter, 8, seed=seed, top_logprobs=3, **fields)
        harness.run()
        tokens = harness.tokens[number]
        logprobs = world.logits(PROMPT, tokens, adapter).log_softmax(dim=1)
        for position, row in enumerate(harness.logprobs[number]):
            expected = logprobs[position]
            assert row.logprob == pytest.approx(float(expected[tokens[position]]), abs=1e-4)
            assert row.top_token_ids == expected.topk(3).indices.tolist()


def test_the_rest_of_a_crowd_is_not_disturbed(world: World, tmp_path: Path) -> None:
    """Requests that adjust nothing draw the same in steps that adjust others' logits."""
    plain: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "stop_token_ids": []}
    tokens = []
    for others in (0, len(FIELDS)):
        harness = EngineHarness(world.model, tmp_path)
        for fields, adapter, seed in list(cases(world))[:others]:
            harness.submit(PROMPT, adapter, MAX_TOKENS, seed=seed, **fields)
        numbers = [harness.submit(PROMPT, None, 40, seed=seed, **plain) for seed in range(8)]
        harness.run()
        tokens.append([harness.tokens[number] for number in numbers])
    assert tokens[0] == tokens[1]
