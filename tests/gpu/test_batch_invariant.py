"""The batch-invariant mode on the GPU: right, and the same to the bit whatever else runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from lorry.kernels.launch_settings import invariant_lora_setting, split_setting
from lorry.kernels.lora_plan import allocate_lora_work, plan_lora
from lorry.kernels.page_layout import GROUPS, PAGE_TOKENS
from lorry.worker.messages import RowLogprobs
from lorry.worker.products import invariant_linear
from tests.gpu.test_real_width import ADAPTERS, LLAMA_3_8B, QWEN3
from tests.support.engines import EngineHarness
from tests.support.kernel_cases import (
    MIXED_ADAPTERS,
    TOLERANCE,
    layout_of,
    mixes,
    relative_error,
    store_adapters,
    store_sequences,
    widths_of,
)
from tests.support.kernel_checks import (
    adapt,
    attend_splits,
    check_attention,
    check_lora,
    rows_of,
)
from tests.support.models import make_adapter, make_model

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PRODUCTS = [(4096, 6144), (14336, 4096), (4096, 28672), (896, 1152), (5120, 32000)]
CHUNKS = [(300, 1), (2900, 1), (45, 45), (700, 33), (1, 1), (16, 16)]  # tokens, new ones
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "llama"},
    "llama-3-8b": LLAMA_3_8B,
    "qwen3": QWEN3,
}
LENGTHS = [300, 77, 40, 1]  # of prompts
MAX_TOKENS = 40
COPIES = 4  # of the requests, where memory is scarce
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.2, "logit_bias": {5: 1.5}},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), PRODUCTS)
def test_a_row_has_one_product_and_it_is_right(gpu, dtype, inputs, outputs):
    torch.manual_seed(0)
    x = torch.randn(517, inputs).to(gpu, dtype)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(gpu, dtype)
    bias = torch.randn(outputs).to(gpu, dtype)
    whole = invariant_linear(x, weight, bias)
    exact = linear(x.double(), weight.double(), bias.double())
    # Sums of 14,336 products, one after the other, in float32.
    assert relative_error(whole, exact) < max(TOLERANCE[dtype], 1e-5)
    for start, end in ((0, 1), (5, 6), (63, 66), (100, 164), (3, 260), (500, 517)):
        assert torch.equal(invariant_linear(x[start:end], weight, bias), whole[start:end])


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "llama-13b", "qwen2.5-0.5b"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_attends_alike_in_any_chunk_and_crowd(gpu, dtype, name, window):
    layout = layout_of(name, dtype)
    shape = layout.geometry
    setting = split_setting(dtype, shape.heads // shape.kv_heads)
    sequences = store_sequences(CHUNKS, layout, gpu, padding=3)
    check_attention(sequences, shape.heads, setting, window)
    rows = len(sequences.sequence_T)
    q_TQD = torch.randn(rows, shape.heads, shape.head_dim).to(sequences.pool.slices)
    whole = attend_splits(sequences, q_TQD, setting, window)
    for start, end in ((0, 1), (1, 2), (2, 9), (9, 47), (30, 31), (46, 48), (50, 81)):
        part = slice(start, end)
        alone = attend_splits(rows_of(sequences, part), q_TQD[part], setting, window)
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_lora_of_a_row_is_the_same_beside_any_others(gpu, dtype, group):
    layout, setting = layout_of("llama-3-8b", dtype), invariant_lora_setting(dtype)
    pool, tables = store_adapters(MIXED_ADAPTERS, layout, gpu)
    slots = mixes(200, len(MIXED_ADAPTERS))["zipf"]
    check_lora(slots, pool, tables, setting, groups=(group,))
    widths = [widths_of(layout, module) for module in GROUPS[group]]
    x_TI = torch.randn(len(slots), widths[0][0]).to(pool.slices)
    base = torch.randn(len(slots), sum(width for _, width in widths)).to(pool.slices)

    def adapted(part: slice) -> torch.Tensor:
        work = allocate_lora_work(setting, layout, max_rows=len(slots), device=gpu)
        plan_lora(torch.tensor(slots[part], dtype=torch.int32, device=gpu), tables, work)
        return adapt(x_TI[part], base[part], group, pool, tables, work)

    whole = adapted(slice(None))
    for row in range(0, len(slots), 23):
        for rows in (1, 3):
            part = slice(row, row + rows)
            assert torch.equal(adapted(part), whole[part])


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[RowLogprobs]
    prompt_logprobs: list[RowLogprobs]


class World:
    """A model, adapters, and requests of all of them that draw in all ways."""

    def __init__(self, directory: Path, device: torch.device, fields: dict[str, Any]) -> None:
        self._directory, self._device = directory, device
        with device:
            self._model = make_model(directory / "model", dtype=torch.bfloat16, **fields)
        adapters = [
            make_adapter(directory / name, self._model, seed=seed, dtype=torch.bfloat16, **adapter)
            for seed, (name, adapter) in enumerate(ADAPTERS.items())
        ]
        random = np.random.default_rng(0)
        self.requests: list[dict[str, Any]] = []
        for adapter in (None, *adapters):
            for length, options in zip(LENGTHS, OPTIONS, strict=True):
                prompt = random.integers(3, fields.get("vocab_size", 320), length).tolist()
                seed = len(self.requests)
                request = {"prompt": prompt, "adapter": adapter, "seed": seed, "top_logprobs": 3}
                self.requests.append(request | options)
        self.requests[1]["prompt_logprobs"] = 2

    def engine(self, **config: Any) -> EngineHarness:
        defaults = {"device": self._device.type, "dtype": "bf16", "batch_invariant": True}
        return EngineHarness(self._model, self._directory, **(defaults | config))

    def scarce_pages(self, harness: EngineHarness) -> int:
        """Enough for the largest adapter, the longest request and little more."""
        adapters = {request["adapter"] for request in self.requests} - {None}
        longest = -(-(max(LENGTHS) + MAX_TOKENS) // PAGE_TOKENS)
        return max(harness.image_pages(adapter) for adapter in adapters) + longest + 4

    def answers(self, harness: EngineHarness, requests: Sequence[dict[str, Any]]) -> list[Answer]:
        """To requests that are sent at once."""
        numbers = [
            harness.submit(max_tokens=MAX_TOKENS, stop_token_ids=[], **request)
            for request in requests
        ]
        harness.run()
        return [
            Answer(harness.tokens[n], harness.logprobs[n], harness.prompt_logprobs[n])
            for n in numbers
        ]


@pytest.fixture(scope="module", params=MODELS)
def world(
    request: pytest.FixtureRequest, gpu: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> World:
    return World(tmp_path_factory.mktemp("world"), gpu, MODELS[request.param])


def test_answers_are_the_same_to_the_bit_whatever_else_runs(world: World) -> None:
    """Alone, in a crowd, cut into other chunks, after preemption and from the prefix cache."""
    harness = world.engine(prefix_cache=False, step_tokens=256)
    alone = [answer for request in world.requests for answer in world.answers(harness, [request])]
    assert len({tuple(answer.tokens) for answer in alone}) > len(alone) // 2
    assert world.answers(harness, world.requests) == alone
    pages = world.scarce_pages(harness)
    del harness
    harness = world.engine(step_tokens=23, max_running=16)
    assert world.answers(harness, world.requests) == alone
    assert world.answers(harness, world.requests) == alone
    assert harness.engine.status().prefix_hit_tokens > 0
    del harness
    harness = world.engine(pool_pages=pages, prefix_cache=False, step_tokens=100)
    assert world.answers(harness, world.requests * COPIES) == alone * COPIES
    assert harness.engine.status().preemptions > 0
