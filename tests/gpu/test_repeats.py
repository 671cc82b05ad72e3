"""Identical steps compute identical bits, in the dtype that models are served in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.engines import EngineHarness
from tests.support.equal_tokens import AdaptedModel, largest_adapter_pages
from tests.support.step_replays import StepReplays
from tests.support.step_trace import PatientLoads, StepTrace

TWENTY = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return AdaptedModel(tmp_path_factory.mktemp("models"))


ADJUSTED: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "logit_bias": {5: 1.5, 319: -3.0},
    "min_tokens": 5,
    "top_logprobs": 3,
    "prompt_logprobs": 2,
}


def engine(
    device: torch.device,
    models: AdaptedModel,
    directory: Path,
    fields: dict[str, Any] | None = None,
    **config: Any,
) -> EngineHarness:
    """With requests of all adapters, greedy and sampled, and prompts of many lengths.

    `fields` are those of each third request.
    """
    defaults = {"device": device.type, "dtype": "bf16", "step_tokens": 64}
    harness = EngineHarness(models.model, directory, **(defaults | config))
    runner: Any = harness.engine.runner
    runner.adapters = PatientLoads(runner.adapters)
    random = np.random.default_rng(0)
    for index in range(40):
        prompt = random.integers(3, 320, int(random.integers(1, 90))).tolist()
        adapter = models.adapters[index % len(models.adapters)]
        own = fields if fields and index % 3 == 1 else {}
        harness.submit(prompt, adapter, 24, temperature=float(index % 3), **own)
    return harness


CONFIGS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "one after the other": {"max_in_flight": 1},
    "evicting and preempting": {"scarce": True},
    "adjusting and reporting": {"fields": ADJUSTED},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_identical_sequences_of_steps_compute_identical_bits(
    device: torch.device, models: AdaptedModel, tmp_path: Path, config: dict[str, Any]
) -> None:
    outcomes = []
    pages = largest_adapter_pages(models, tmp_path) + 20 if "scarce" in config else 2000
    for _ in range(2):
        harness = engine(device, models, tmp_path, config.get("fields"), pool_pages=pages)
        runner: Any = harness.engine.runner
        runner.max_in_flight = config.get("max_in_flight", 2)
        trace = StepTrace(harness.engine)
        harness.run()
        reported = harness.logprobs, harness.prompt_logprobs
        outcomes.append((trace.plans(), trace.digests(), harness.tokens, reported))
        if "scarce" in config:
            assert harness.engine.status().adapter_evictions > 0
            assert harness.engine.status().preemptions > 0
    for first, second in zip(*outcomes, strict=True):
        assert first == second
    assert len(set(outcomes[0][1])) > TWENTY


def test_twenty_runs_of_a_step_compute_identical_bits(
    gpu: torch.device, models: AdaptedModel, tmp_path: Path
) -> None:
    replays = StepReplays(engine(gpu, models, tmp_path, ADJUSTED))
    replays.run_until(lambda step: step.is_mixed)
    assert not replays.differences(TWENTY)
