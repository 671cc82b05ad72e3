"""The engine on the GPU answers token for token like transformers + peft in float32."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.worker import step_graphs
from tests.support.engines import EngineHarness
from tests.support.equal_tokens import (
    ADAPTERS,
    MODELS,
    PrefixWorld,
    World,
    check_answers,
    largest_adapter_pages,
)
from tests.support.step_trace import StepTrace


@pytest.fixture(scope="module", params=MODELS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), MODELS[request.param])


def engine(device: torch.device, world: World, directory: Path, **config: Any) -> EngineHarness:
    defaults = {"device": device.type, "dtype": "fp32", "step_tokens": 64}
    return EngineHarness(world.model, directory, **(defaults | config))


@pytest.mark.parametrize("step_tokens", [64, 600])
def test_all_adapters_in_one_batch(
    device: torch.device, world: World, tmp_path: Path, step_tokens: int
) -> None:
    harness = engine(device, world, tmp_path, step_tokens=step_tokens)
    check_answers(world, harness)
    assert harness.engine.gauges.max_adapters_beside_base_in_step == len(ADAPTERS)


def test_prompts_cut_into_chunks_anywhere(
    device: torch.device, world: World, tmp_path: Path
) -> None:
    check_answers(world, engine(device, world, tmp_path, max_running=8, step_tokens=13))


def test_steps_one_after_the_other(device: torch.device, world: World, tmp_path: Path) -> None:
    harness = engine(device, world, tmp_path)
    harness.engine.runner.max_in_flight = 1
    check_answers(world, harness)


class Eager:
    """Takes the place of a graph and launches kernel by kernel what one would hold."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


def test_steps_without_graphs(
    gpu: torch.device, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(runs: Mapping[Any, Callable[[], None]]) -> dict[Any, Eager]:
        return {key: Eager(run) for key, run in runs.items()}

    monkeypatch.setattr(step_graphs, "capture_graphs", kept)
    check_answers(world, engine(gpu, world, tmp_path))


def test_eviction_and_reload_leave_no_trace_in_the_tokens(
    device: torch.device, world: World, tmp_path: Path
) -> None:
    pages = largest_adapter_pages(world, tmp_path) + 40
    harness = engine(device, world, tmp_path, pool_pages=pages)
    for _ in range(2):
        check_answers(world, harness)
    assert harness.engine.status().adapter_evictions > 0
    assert harness.engine.status().adapter_loads > len(ADAPTERS)


def test_preemption_leaves_no_trace_in_the_tokens(
    device: torch.device, world: World, tmp_path: Path
) -> None:
    pages = largest_adapter_pages(world, tmp_path) + 8
    harness = engine(device, world, tmp_path, pool_pages=pages)
    check_answers(world, harness, copies=12, longest=17)
    assert harness.engine.status().preemptions > 0


def test_shared_prefixes_leave_no_trace_in_the_tokens(device: torch.device, tmp_path: Path) -> None:
    """With pages for all at first, then so few that they are evicted and sequences preempted."""
    world = PrefixWorld(tmp_path, MODELS["gqa-tied"], adapters=["r3", "r16-rslora"])
    scarce = largest_adapter_pages(world, tmp_path) + 16
    for pages, copies in ((2000, 2), (scarce, 5)):
        harness = engine(device, world, tmp_path, pool_pages=pages, step_tokens=32, max_running=16)
        check_answers(world, harness, copies=copies)
        check_answers(world, harness)
        status = harness.engine.status()
        assert status.prefix_hit_tokens > 0
    assert status.prefix_evictions > 0
    assert status.preemptions > 0


def test_hidden_states_equal_those_of_the_references(
    device: torch.device, world: World, tmp_path: Path
) -> None:
    """Of steps with chunks and decodes of all adapters: tokens alone would hide small errors."""
    harnesses = [
        EngineHarness(world.model, tmp_path, device=name, dtype="fp32", step_tokens=64)
        for name in (device.type, "cpu")
    ]
    actual, expected = (StepTrace(harness.engine) for harness in harnesses)
    for harness in harnesses:
        check_answers(world, harness)
    for number in harnesses[0].tokens:
        want = expected.logits(number)
        got = actual.logits(number).cpu()[: len(want)]  # overlapped steps compute one row too many
        error = (got - want).abs().max() / want.std()
        assert error < 1e-4
