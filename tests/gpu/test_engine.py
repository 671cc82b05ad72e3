"""The engine on the GPU answers the demo's requests, and its steps cost the host little."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.profiler import ProfilerActivity, profile

from lorry.rpc.service_config import DtypeName
from lorry.worker.cuda_runner import CudaRunner
from tests.support.engines import EngineHarness
from tests.support.step_trace import StepTrace

DEMO = Path(__file__).parents[2] / "demo"
REQUESTS: list[dict[str, Any]] = json.loads((DEMO / "expected.json").read_text())
TOKENIZER = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
LAYERS = 4


def demo_engine(
    device: torch.device, directory: Path, dtype: DtypeName, **config: Any
) -> EngineHarness:
    return EngineHarness(DEMO / "model", directory, device=device.type, dtype=dtype, **config)


def submit(harness: EngineHarness, request: dict[str, Any], **fields: Any) -> int:
    adapter = DEMO / "adapters" / request["adapter"] if request["adapter"] else None
    max_tokens = fields.pop("max_tokens", request["max_tokens"])
    return harness.submit(prompt_ids(request["prompt"]), adapter, max_tokens, **fields)


def prompt_ids(prompt: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(prompt).ids
    return ids


def answers(harness: EngineHarness) -> list[list[int]]:
    """Token ids of all requests, sent at once."""
    numbers = [submit(harness, request) for request in REQUESTS]
    harness.run()
    assert harness.engine.status().max_adapters_beside_base_in_step == 8
    return [harness.tokens[number] for number in numbers]


def test_fp32_tokens_equal_those_of_transformers_and_peft(
    device: torch.device, tmp_path: Path
) -> None:
    harness = demo_engine(device, tmp_path, "fp32", pool_pages=4000)
    assert answers(harness) == [r["token_ids"] for r in REQUESTS]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_the_adapters_accuracy(
    device: torch.device, dtype: DtypeName, tmp_path: Path
) -> None:
    got = answers(demo_engine(device, tmp_path, dtype, pool_pages=8000))
    right = sum(
        tokens == request["token_ids"] for tokens, request in zip(got, REQUESTS, strict=True)
    )
    assert right >= 0.97 * len(REQUESTS)


def decoding_engine(device: torch.device, directory: Path) -> EngineHarness:
    """An engine in which requests of all adapters decode."""
    harness = demo_engine(device, directory, "bf16", pool_pages=8000)
    for request in REQUESTS[:48]:
        submit(harness, request, max_tokens=200, stop_token_ids=[])
    for _ in range(20):
        harness.step()
    return harness


@contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """Within it, an operation that waits for the GPU raises."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steady_steps_never_wait_for_the_device(device: torch.device, tmp_path: Path) -> None:
    harness = decoding_engine(device, tmp_path)
    with never_waiting(device):
        for _ in range(50):
            harness.step()
    harness.run()


def test_arriving_prompts_and_adapters_make_no_step_wait(
    device: torch.device, tmp_path: Path
) -> None:
    """Steps of chunks and decodes, loads and evictions, once every image has been fetched."""
    harness = demo_engine(device, tmp_path, "bf16", pool_pages=60, step_tokens=64)
    requests = itertools.cycle(REQUESTS)

    def serve(steps: int) -> None:
        for _ in range(steps):
            submit(harness, next(requests), max_tokens=6, stop_token_ids=[])
            harness.step()

    serve(100)
    before, trace = harness.engine.status(), StepTrace(harness.engine)
    with never_waiting(device):
        serve(50)
    status = harness.engine.status()
    assert status.adapter_loads > before.adapter_loads
    assert status.adapter_evictions > before.adapter_evictions
    assert any(step.is_mixed for step in trace.steps)
    harness.run()


def test_every_step_is_a_graph_replay(gpu: torch.device, tmp_path: Path) -> None:
    harness = decoding_engine(gpu, tmp_path)
    harness.run()
    runner = harness.engine.runner
    assert isinstance(runner, CudaRunner)
    assert runner.graphs.replays == harness.engine.scheduler.steps


def test_a_step_launches_a_known_number_of_kernels(gpu: torch.device, tmp_path: Path) -> None:
    """Whatever the requests and the adapters: here 48 and 8."""
    harness = decoding_engine(gpu, tmp_path)
    steps = 10
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            harness.step()
        torch.cuda.synchronize()
    launches = Counter[str]()
    for event in profiled.key_averages():
        if "CUDA" in str(event.device_type) and "Mem" not in event.key:
            launches[event.key] += event.count
    ours = {
        "_shrink_kernel": 4 * LAYERS,
        "_expand_kernel": 3 * LAYERS,
        "_expand_rope_kernel": LAYERS,
        "attention_kernel": 2 * LAYERS,
        "_rope_write_kv_kernel": 0,
        "_rms_norm_kernel": 2 * LAYERS + 1,
        "_swiglu_kernel": LAYERS,
    }
    assert {name: launches[name] / steps for name in ours} == ours
    products = 2 * 4 * LAYERS  # at most: some split their sums and add them in a second kernel
    rest = 48  # plans, embedding, head, sampling, and what a step changes in the tables
    assert launches.total() / steps <= sum(ours.values()) + products + rest


def test_eviction_and_preemption_leave_no_trace_in_fp32_tokens(
    device: torch.device, tmp_path: Path
) -> None:
    tokens, status = [], []
    for pool_pages in (4000, 90):
        harness = demo_engine(device, tmp_path, "fp32", pool_pages=pool_pages)
        for request in REQUESTS:
            submit(harness, request, max_tokens=40, stop_token_ids=[])
        harness.run()
        tokens.append(harness.tokens)
        status.append(harness.engine.status())
    assert tokens[0] == tokens[1]
    assert status[1].adapter_evictions > 0
    assert status[1].preemptions > 0


def test_stop_tokens_wait_for_min_tokens(device: torch.device, tmp_path: Path) -> None:
    harness = demo_engine(device, tmp_path, "fp32")
    prompt = prompt_ids(REQUESTS[0]["prompt"])
    number = harness.submit(prompt, None, 30, min_tokens=25)
    other = harness.submit(prompt, None, 30)
    harness.run()
    assert len(harness.tokens[number]) >= 25
    assert len(harness.tokens[other]) < 25


def test_seeded_samples_do_not_depend_on_the_crowd(device: torch.device, tmp_path: Path) -> None:
    prompt = prompt_ids(REQUESTS[0]["prompt"])
    drawn = []
    for crowd in (0, 20):
        harness = demo_engine(device, tmp_path, "fp32")
        for seed in range(crowd):
            harness.submit(prompt, None, 20, temperature=1.2, seed=seed, stop_token_ids=[])
        number = harness.submit(
            prompt, None, 20, temperature=1.0, seed=2**64 - 3, stop_token_ids=[]
        )
        harness.run()
        drawn.append(harness.tokens[number])
    assert drawn[0] == drawn[1]
