"""The engine in bfloat16 on a model of real width: its error, and that it repeats itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.engines import EngineHarness
from tests.support.models import make_adapter, make_model
from tests.support.step_replays import StepReplays
from tests.support.step_trace import PatientLoads, StepTrace

TWENTY = 20
MOST_ERROR = 1.25  # where that of transformers and peft is 1
LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
QWEN3: dict[str, Any] = {  # of 0.6B's width, with all that a family can have
    "model_type": "qwen3",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.02,
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 128,
    "max_window_layers": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
MODELS = {"llama-3-8b": LLAMA_3_8B, "qwen3": QWEN3}
SMALL = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 1024}
ADAPTERS: dict[str, dict[str, Any]] = {
    "r16": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "r64": {"r": 64, "lora_alpha": 64, "target_modules": "all-linear"},
}
LENGTHS = [300, 77, 1]  # of prompts
MAX_TOKENS = 24


class Request(NamedTuple):
    adapter: str | None
    prompt: list[int]


class World:
    """A model and its adapters, of values that bfloat16 holds, and requests."""

    def __init__(self, directory: Path, device: torch.device, fields: dict[str, Any]) -> None:
        fields = fields if device.type == "cuda" else fields | SMALL
        self.device, self.directory = device, directory
        with device:
            self.model = make_model(directory / "model", dtype=torch.bfloat16, **fields)
        self.adapters = {
            name: make_adapter(
                directory / name, self.model, seed=seed, dtype=torch.bfloat16, **adapter
            )
            for seed, (name, adapter) in enumerate(ADAPTERS.items())
        }
        random = np.random.default_rng(0)
        self.requests = [
            Request(adapter, random.integers(3, fields["vocab_size"], length).tolist())
            for adapter in (None, *ADAPTERS)
            for length in LENGTHS
        ]

    def engine(self) -> EngineHarness:
        """With all requests, so that steps have rows of all adapters."""
        config = {"device": self.device.type, "dtype": "bf16", "step_tokens": 256}
        harness = EngineHarness(self.model, self.directory, pool_pages=600, **config)
        runner: Any = harness.engine.runner
        runner.adapters = PatientLoads(runner.adapters)
        for adapter, prompt in self.requests:
            path = self.adapters[adapter] if adapter else None
            harness.submit(prompt, path, MAX_TOKENS, stop_token_ids=[])
        return harness

    @torch.inference_mode()
    def reference(self, dtype: torch.dtype, sequences: Sequence[list[int]]) -> list[torch.Tensor]:
        """Logits of all positions of the requests' sequences by transformers and peft."""
        base: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        (first, path), *others = self.adapters.items()
        model = PeftModel.from_pretrained(base, path, adapter_name=first)
        for name, path in others:
            model.load_adapter(path, adapter_name=name)
        model = model.to(self.device).eval()
        logits = []
        for (adapter, _), token_ids in zip(self.requests, sequences, strict=True):
            input_ids = torch.tensor([token_ids], device=self.device)
            if adapter is None:
                with model.disable_adapter():
                    logits.append(model(input_ids).logits[0].float())
            else:
                model.set_adapter(adapter)
                logits.append(model(input_ids).logits[0].float())
        return logits


@pytest.fixture(scope="module", params=MODELS)
def world(
    request: pytest.FixtureRequest,
    device: torch.device,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    return World(tmp_path_factory.mktemp("real"), device, MODELS[request.param])


def error(actual: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Root mean square over all logits."""
    difference = torch.cat(list(actual)) - torch.cat(list(exact))
    return float(difference.double().square().mean().sqrt())


def test_logits_are_as_exact_as_those_of_transformers_and_peft(world: World) -> None:
    harness = world.engine()
    trace = StepTrace(harness.engine)
    harness.run()
    assert any(step.is_mixed for step in trace.steps)
    served = [trace.logits(number) for number in harness.tokens]
    sequences = [
        (prompt + tokens)[: len(logits)]
        for (_, prompt), tokens, logits in zip(
            world.requests, harness.tokens.values(), served, strict=True
        )
    ]
    assert [len(s) for s in sequences] == [n + MAX_TOKENS - 1 for n in LENGTHS] * 3
    exact, usual = (world.reference(dtype, sequences) for dtype in (torch.float32, torch.bfloat16))
    base_only = error(exact[: len(LENGTHS)], usual[: len(LENGTHS)])
    assert 0 < base_only < 0.05 * float(torch.cat(exact).std())
    for first in range(0, len(served), len(LENGTHS)):
        part = slice(first, first + len(LENGTHS))
        ratio = error(served[part], exact[part]) / error(usual[part], exact[part])
        print(f"{world.requests[first].adapter}: {ratio:.3f} of transformers' and peft's error")
        assert ratio <= MOST_ERROR, world.requests[first].adapter


def test_twenty_runs_of_a_step_compute_identical_bits(gpu: torch.device, world: World) -> None:
    replays = StepReplays(world.engine())
    replays.run_until(lambda step: step.is_mixed)
    assert not replays.differences(TWENTY)
    replays.run_until(lambda step: len(step.length) > 1 and step.length.max() == 1)
    assert not replays.differences(TWENTY)
