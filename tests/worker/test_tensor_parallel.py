"""Engines of several ranks, threads over real gloo, answer like an engine that is alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engines import EngineHarness
from tests.support.models import make_adapter, make_llama
from tests.support.rank_threads import rank_harness

RANKS: dict[int, Any] = {
    1: ["q_proj", "v_proj"],
    3: "all-linear",
    5: ["o_proj", "down_proj"],
    8: ["gate_proj"],
    33: ["k_proj", "o_proj", "up_proj"],
    256: "all-linear",
}
Submit = Callable[[EngineHarness], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an odd vocabulary and an odd intermediate width."""
    directory = tmp_path_factory.mktemp("model")
    return make_llama(directory, vocab_size=321, intermediate_size=130, num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path | None]:
    directory = tmp_path_factory.mktemp("adapters")
    made = [
        make_adapter(
            directory / str(r), model, seed=r, r=r, lora_alpha=r**0.5, target_modules=targets
        )
        for r, targets in RANKS.items()
    ]
    return [None, *made]


def check_ranks(
    model: Path, tmp_path: Path, submit: Submit, *, size: int, strategy: str, **config: Any
) -> EngineHarness:
    """Compare with an engine that is alone and has room for all; returns that of the ranks."""
    alone = EngineHarness(model, tmp_path)
    submit(alone)
    alone.run()
    with rank_harness(
        model, tmp_path, tensor_parallel=size, lora_strategy=strategy, **config
    ) as ranks:
        submit(ranks)
        ranks.run()
    assert ranks.tokens == alone.tokens
    for number, rows in alone.logprobs.items():
        for actual, expected in zip(ranks.logprobs[number], rows, strict=True):
            assert actual.top_token_ids == expected.top_token_ids
            assert actual.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert actual.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)
    for number, rows in alone.prompt_logprobs.items():
        actual_rows = ranks.prompt_logprobs[number]
        assert [row.logprob for row in actual_rows] == pytest.approx(
            [row.logprob for row in rows], abs=1e-4
        )
    return ranks


@pytest.mark.parametrize(("size", "strategy"), [(2, "replicated"), (4, "slora")])
def test_adapters_of_any_rank_and_targets_with_evictions(
    model: Path, adapters: list[Path | None], tmp_path: Path, size: int, strategy: str
) -> None:
    def submit(harness: EngineHarness) -> None:
        random = np.random.default_rng(0)
        for adapter in [*adapters, *reversed(adapters)]:
            prompt = random.integers(3, 321, int(random.integers(1, 60))).tolist()
            harness.submit(prompt, adapter, max_tokens=16)

    ranks = check_ranks(
        model,
        tmp_path,
        submit,
        size=size,
        strategy=strategy,
        pool_pages=largest_pages(model, adapters, tmp_path, size, strategy) + 12,
        max_running=8,
        step_tokens=48,
    )
    assert ranks.engine.gauges.adapter_evictions > 0


def test_preempted_requests_go_on_alike(
    model: Path, adapters: list[Path | None], tmp_path: Path
) -> None:
    few = adapters[:3]

    def submit(harness: EngineHarness) -> None:
        for index in range(8):
            prompt = list(range(3 + index, 13 + index))
            harness.submit(prompt, few[index % 3], max_tokens=90, stop_token_ids=[])

    ranks = check_ranks(
        model,
        tmp_path,
        submit,
        size=2,
        strategy="slora",
        pool_pages=largest_pages(model, few, tmp_path, 2, "slora") + 30,
        max_running=8,
        step_tokens=48,
    )
    assert ranks.engine.scheduler.preemptions > 0


def largest_pages(
    model: Path, adapters: list[Path | None], tmp_path: Path, size: int, strategy: str
) -> int:
    """Of the adapters' images: each rank's pages are smaller than a whole model's."""
    with rank_harness(
        model, tmp_path, tensor_parallel=size, lora_strategy=strategy, pool_pages=1
    ) as ranks:
        return max(ranks.image_pages(adapter) for adapter in adapters if adapter is not None)


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.9},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.6, "min_p": 0.02},
    {"temperature": 1.1, "min_p": 0.1, "top_k": 1000},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.7, "logit_bias": {5: 4.0, 200: 6.0, 320: 5.0, 319: -100.0}},
    {"min_tokens": 12, "stop_token_ids": [7, 160, 161, 320]},
    {"top_logprobs": 20, "prompt_logprobs": 3},
    {"top_logprobs": 0, "temperature": 0.5, "top_p": 0.9},
]


def test_every_way_of_drawing(model: Path, adapters: list[Path | None], tmp_path: Path) -> None:
    """Ranks merge candidates and sums; ids of both ends of the vocabulary are biased and banned."""

    def submit(harness: EngineHarness) -> None:
        for index, fields in enumerate(SAMPLING):
            prompt = list(range(3 + index, 20 + 2 * index))
            harness.submit(prompt, adapters[index % 3], max_tokens=16, **fields)

    check_ranks(model, tmp_path, submit, size=2, strategy="slora", step_tokens=64, max_running=16)
