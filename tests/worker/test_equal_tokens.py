"""The engine answers token for token like transformers + peft in float32."""

from pathlib import Path

import pytest

from lorry.worker.torch_runner import TorchRunner
from tests.support.engines import EngineHarness
from tests.support.equal_tokens import (
    ADAPTERS,
    LENGTHS,
    MAX_TOKENS,
    MODELS,
    World,
    check_answers,
    largest_adapter_pages,
)
from tests.support.models import EOS, Reference, first_difference


@pytest.fixture(scope="module", params=MODELS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), MODELS[request.param])


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
