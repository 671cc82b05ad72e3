"""The engine answers token for token like transformers + peft in float32."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorry.worker.torch_runner import TorchRunner
from tests.support.engines import EngineHarness
from tests.support.models import EOS, Greedy, Reference, first_difference, make_adapter, make_llama

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


class World:
    """A model, its adapters, and the reference's answers to a fixed set of requests."""

    def __init__(self, directory: Path, model_fields: dict[str, Any]) -> None:
        self.model = make_llama(directory / "model", **model_fields)
        self.adapters = [None] + [
            make_adapter(directory / name, self.model, seed=seed, **fields)
            for seed, (name, fields) in enumerate(ADAPTERS.items())
        ]
        reference = Reference(self.model)
        random = np.random.default_rng(0)
        self.requests: list[tuple[list[int], Path | None, Greedy]] = []
        for index, adapter in enumerate(itertools.chain(self.adapters * 2)):
            length = LENGTHS[index % len(LENGTHS)]
            prompt = random.integers(3, 320, length).tolist()
            self.requests.append((prompt, adapter, reference.greedy(prompt, adapter, MAX_TOKENS)))


@pytest.fixture(scope="module", params=MODELS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), MODELS[request.param])


def check_answers(
    world: World, harness: EngineHarness, *, copies: int = 1, longest: int = max(LENGTHS)
) -> None:
    """Send each request with a prompt up to `longest` `copies` times at once; compare answers."""
    requests = [request for request in world.requests if len(request[0]) <= longest] * copies
    numbers = [harness.submit(prompt, adapter, MAX_TOKENS) for prompt, adapter, _ in requests]
    harness.run()
    for number, (prompt, adapter, expected) in zip(numbers, requests, strict=True):
        actual = harness.tokens[number]
        assert first_difference(expected, actual) is None, (
            f"{adapter} after {len(prompt)} tokens: {actual}, not {expected.token_ids}"
        )
        assert harness.finished[number].failure is None


def test_reference_is_worth_comparing_with(world: World) -> None:
    answers = [tuple(expected.token_ids) for _, _, expected in world.requests]
    assert len(set(answers)) == len(answers)
    assert len({token_id for answer in answers for token_id in answer}) > 50
    base = Reference(world.model)
    for prompt, adapter, expected in world.requests:
        if adapter is not None:
            assert base.greedy(prompt, None, MAX_TOKENS).token_ids != expected.token_ids


@pytest.mark.parametrize("step_tokens", [64, 100, 1024])
def test_all_adapters_in_one_batch(world: World, tmp_path: Path, step_tokens: int) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=step_tokens)
    check_answers(world, harness)
    assert harness.engine.gauges.max_adapters_beside_base_in_step == len(ADAPTERS)


def test_prompts_cut_into_chunks_anywhere(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path, max_running=8, step_tokens=13)
    check_answers(world, harness)  # chunks of 13 rows less what the others decode


def test_one_request_at_a_time(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=64)
    for prompt, adapter, expected in world.requests:
        number = harness.submit(prompt, adapter, MAX_TOKENS)
        harness.run()
        assert first_difference(expected, harness.tokens[number]) is None


def test_eviction_and_reload_leave_no_trace_in_the_tokens(world: World, tmp_path: Path) -> None:
    longest = -(-(max(LENGTHS) + MAX_TOKENS) // 16)
    pages = largest_adapter_pages(world, tmp_path) + longest
    harness = EngineHarness(world.model, tmp_path, step_tokens=64, pool_pages=pages)
    for _ in range(2):
        check_answers(world, harness)
    status = harness.engine.status()
    assert status.adapter_evictions >= len(ADAPTERS)
    assert status.adapter_loads > len(ADAPTERS)


def test_preemption_leaves_no_trace_in_the_tokens(world: World, tmp_path: Path) -> None:
    pages = largest_adapter_pages(world, tmp_path) + 8
    harness = EngineHarness(world.model, tmp_path, step_tokens=64, pool_pages=pages)
    check_answers(world, harness, copies=12, longest=17)
    assert harness.engine.status().preemptions > 0


def largest_adapter_pages(world: World, tmp_path: Path) -> int:
    harness = EngineHarness(world.model, tmp_path, pool_pages=1)
    return max(harness.image_pages(adapter) for adapter in world.adapters if adapter)


def test_steps_that_overlap_leave_no_trace_in_the_tokens(world: World, tmp_path: Path) -> None:
    pages = largest_adapter_pages(world, tmp_path) + 60
    harness = EngineHarness(world.model, tmp_path, step_tokens=64, pool_pages=pages)
    assert isinstance(harness.engine.runner, TorchRunner)
    harness.engine.runner.max_in_flight = 2
    check_answers(world, harness, copies=6, longest=257)
    assert harness.engine.status().preemptions > 0


def test_stop_token_ends_the_output(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path)
    prompt, adapter, expected = world.requests[3]
    stop = expected.token_ids[4]
    first = expected.token_ids.index(stop)
    number = harness.submit(prompt, adapter, 12, stop_token_ids=[EOS, stop])
    held = harness.submit(prompt, adapter, 12, stop_token_ids=[EOS, stop], min_tokens=12)
    harness.run()
    assert harness.tokens[number] == expected.token_ids[: first + 1]
    assert stop not in harness.tokens[held][:11]
