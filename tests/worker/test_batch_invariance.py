"""What a batch-invariant engine answers is the same to the bit, whatever it computes beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lorry.kernels import lora_plan
from lorry.worker import torch_runner
from lorry.worker.config import EngineConfig
from tests.support.engines import EngineHarness
from tests.support.interpreted_engine import interpreted_engine, invariant_operations
from tests.support.models import make_adapter, make_model

MAX_TOKENS = 2
REQUESTS: list[dict[str, Any]] = [
    {"prompt": list(range(3, 23)), "adapter": "mixed", "temperature": 0.9, "seed": 7},
    {"prompt": list(range(50, 61)), "adapter": None, "temperature": 0.0},
    {"prompt": [9], "adapter": "attention", "temperature": 0.0},
]

KERNELS = {
    *("_product_kernel", "_shrink_kernel", "_expand_kernel", "_split_kernel", "_merge_kernel"),
    *("_rms_norm_kernel", "_rope_write_kv_kernel", "_swiglu_kernel"),
}


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[Any]
    prompt_logprobs: list[Any]


class World:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._model = make_model(directory / "model", model_type="llama", num_hidden_layers=1)
        targets = {"mixed": "all-linear", "attention": ["q_proj", "v_proj"]}
        self._adapters = {
            name: make_adapter(directory / name, self._model, seed=1, r=5, target_modules=modules)
            for name, modules in targets.items()
        }

    def answers(self, requests: list[dict[str, Any]], **config: Any) -> list[Answer]:
        """To requests that are sent at once."""
        harness = interpreted_engine(self._model, self._directory, **config)
        numbers = [self._submit(harness, **request) for request in requests]
        harness.run()
        return [
            Answer(harness.tokens[n], harness.logprobs[n], harness.prompt_logprobs[n])
            for n in numbers
        ]

    def _submit(
        self, harness: EngineHarness, prompt: list[int], adapter: str | None, **fields: Any
    ) -> int:
        path = self._adapters[adapter] if adapter else None
        defaults = {"top_logprobs": 2, "prompt_logprobs": 1, "stop_token_ids": []}
        return harness.submit(prompt, path, MAX_TOKENS, **(defaults | fields))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(torch_runner, "TorchOperations", invariant_operations)
    monkeypatch.setattr(lora_plan, "PLANNERS", 1)  # they run one after the other here
    return World(tmp_path)


def test_answers_do_not_depend_on_the_crowd_the_chunks_or_a_new_start(world: World) -> None:
    crowd = world.answers(REQUESTS)
    assert [len(answer.logprobs) for answer in crowd] == [MAX_TOKENS] * len(REQUESTS)
    request, answer = REQUESTS[0], crowd[0]
    assert world.answers([request]) == [answer]
    assert world.answers(REQUESTS, step_tokens=13, max_running=4) == crowd
    sent = answer.tokens[:1]
    resumed = request | {"prompt": request["prompt"] + sent, "generated_tokens": len(sent)}
    (rest,) = world.answers([resumed])
    assert (rest.tokens, rest.logprobs) == (answer.tokens[1:], answer.logprobs[1:])
    assert rest.prompt_logprobs[: len(answer.prompt_logprobs)] == answer.prompt_logprobs


def test_steps_of_any_number_of_rows_run_the_same_machine_code() -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "tests.support.same_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    code_of_one, *others = json.loads(done.stdout).values()
    assert {name for name, _ in code_of_one} == KERNELS
    assert others == [code_of_one] * len(others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "batch_invariant needs device cuda, got cpu"),
        (
            {"device": "cuda", "tensor_parallel": 2},
            "batch_invariant needs tensor_parallel 1, got 2",
        ),
    ],
)
def test_what_cannot_keep_the_promise_is_refused_by_name(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model=Path("model"), pool_pages=1, batch_invariant=True, **options)
