"""The engine on the GPU answers the demo's requests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.rpc.service_config import DtypeName
from lorry.worker.cuda_runner import CudaRunner
from tests.support.engines import EngineHarness

DEMO = Path(__file__).parents[2] / "demo"
REQUESTS: list[dict[str, Any]] = json.loads((DEMO / "expected.json").read_text())


def answers(dtype: DtypeName, directory: Path, pool_pages: int) -> list[list[int]]:
    """Token ids of all requests, sent at once."""
    harness = EngineHarness(
        DEMO / "model", directory, device="cuda", dtype=dtype, pool_pages=pool_pages
    )
    numbers = [
        harness.submit(
            prompt_ids(request["prompt"]),
            DEMO / "adapters" / request["adapter"] if request["adapter"] else None,
            request["max_tokens"],
        )
        for request in REQUESTS
    ]
    harness.run()
    assert harness.engine.status().max_adapters_beside_base_in_step == 8
    return [harness.tokens[number] for number in numbers]


def prompt_ids(prompt: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json")).encode(prompt).ids
    return ids


def test_fp32_tokens_equal_those_of_transformers_and_peft(tmp_path: Path) -> None:
    assert answers("fp32", tmp_path, 4000) == [r["token_ids"] for r in REQUESTS]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_the_adapters_accuracy(dtype: DtypeName, tmp_path: Path) -> None:
    got = answers(dtype, tmp_path, 8000)
    right = sum(
        tokens == request["token_ids"] for tokens, request in zip(got, REQUESTS, strict=True)
    )
    assert right >= 0.97 * len(REQUESTS)


def decoding_harness(directory: Path, **config: Any) -> EngineHarness:
    """An engine in which requests of all adapters decode."""
    harness = EngineHarness(DEMO / "model", directory, device="cuda", dtype="bf16", **config)
    for request in REQUESTS[:48]:
        adapter = DEMO / "adapters" / request["adapter"] if request["adapter"] else None
        harness.submit(prompt_ids(request["prompt"]), adapter, 200, stop_token_ids=[])
    for _ in range(20):
        harness.step()
    return harness


def test_steady_steps_never_wait_for_the_device(tmp_path: Path) -> None:
    harness = decoding_harness(tmp_path, pool_pages=8000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            harness.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    harness.run()


def test_every_step_is_a_graph_replay(tmp_path: Path) -> None:
    harness = decoding_harness(tmp_path, pool_pages=8000)
    harness.run()
    runner = harness.engine.runner
    assert isinstance(runner, CudaRunner)
    assert runner.graphs.replays == harness.engine.scheduler.steps


def test_the_same_steps_draw_the_same_tokens(tmp_path: Path) -> None:
    first, second = (decoding_harness(tmp_path, pool_pages=8000) for _ in range(2))
    for harness in (first, second):
        harness.run()
    assert first.tokens == second.tokens


def test_eviction_and_preemption_leave_no_trace_in_fp32_tokens(tmp_path: Path) -> None:
    tokens, status = [], []
    for pool_pages in (4000, 90):
        harness = EngineHarness(
            DEMO / "model", tmp_path, device="cuda", dtype="fp32", pool_pages=pool_pages
        )
        for request in REQUESTS:
            adapter = DEMO / "adapters" / request["adapter"] if request["adapter"] else None
            harness.submit(prompt_ids(request["prompt"]), adapter, 40, stop_token_ids=[])
        harness.run()
        tokens.append(harness.tokens)
        status.append(harness.engine.status())
    assert tokens[0] == tokens[1]
    assert status[1].adapter_evictions > 0
    assert status[1].preemptions > 0


def test_stop_tokens_wait_for_min_tokens(tmp_path: Path) -> None:
    harness = EngineHarness(DEMO / "model", tmp_path, device="cuda", dtype="fp32")
    prompt = prompt_ids(REQUESTS[0]["prompt"])
    number = harness.submit(prompt, None, 30, min_tokens=25)
    other = harness.submit(prompt, None, 30)
    harness.run()
    assert len(harness.tokens[number]) >= 25
    assert len(harness.tokens[other]) < 25


def test_seeded_samples_do_not_depend_on_the_crowd(tmp_path: Path) -> None:
    prompt = prompt_ids(REQUESTS[0]["prompt"])
    drawn = []
    for crowd in (0, 20):
        harness = EngineHarness(DEMO / "model", tmp_path, device="cuda", dtype="fp32")
        for seed in range(crowd):
            harness.submit(prompt, None, 20, temperature=1.2, seed=seed, stop_token_ids=[])
        number = harness.submit(
            prompt, None, 20, temperature=1.0, seed=2**64 - 3, stop_token_ids=[]
        )
        harness.run()
        drawn.append(harness.tokens[number])
    assert drawn[0] == drawn[1]
