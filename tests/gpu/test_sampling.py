"""Truncated sampling and logprobs: kernels at real widths, and the engine's captured heads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lorry.kernels.logprobs import packed_logprobs, rank, unpacked, write_logprobs
from lorry.kernels.sampling import sample, sample_reference
from lorry.kernels.truncation import truncate
from lorry.rpc.service_config import DtypeName
from tests.support.adjustment_cases import check_adjustments, mixed_adjustments, mixed_tables
from tests.support.engines import EngineHarness
from tests.support.sampling_cases import (
    Truncation,
    check_logprobs,
    check_rows_of_nans,
    check_truncation,
    mixed_logits,
    mixed_num_top,
    mixed_truncation,
)
from tests.support.step_trace import PatientLoads

DEMO = Path(__file__).parents[2] / "demo"
REQUESTS: list[dict[str, Any]] = json.loads((DEMO / "expected.json").read_text())
TOKENIZER = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 128_256), (7, 151_937), (33, 50_257), (64, 32_000), (512, 128_256)]
WIDTH = 128_256
TWENTY = 20
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8, "top_logprobs": 20},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "top_logprobs": 0},
    {"temperature": 1.2, "top_k": 1},
    {"temperature": 1.0},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.2, "top_logprobs": 5},
    {},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_truncation_matches_the_reference(device, dtype, rows, vocabulary):
    logits = mixed_logits(rows, vocabulary, dtype, device)
    check_truncation(logits, mixed_truncation(rows, device, seed=rows))


@pytest.mark.parametrize("top_k", [1, 50, 8192, 8193, WIDTH - 1])
def test_top_k_keeps_exactly_k_distinct_logits(device, top_k):
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.randperm(WIDTH, generator=generator, device=device).float()[None]
    row = Truncation(
        torch.ones(1, device=device),
        torch.full((1,), top_k, dtype=torch.int32, device=device),
        torch.ones(1, device=device),
        torch.zeros(1, device=device),
    )
    assert int((logits >= truncate(logits, *row)).sum()) == top_k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_adjustments_match_the_reference(device, dtype, rows, vocabulary):
    logits = mixed_logits(rows, vocabulary, dtype, device)
    tables = mixed_tables(rows, vocabulary, device)
    check_adjustments(logits, tables, mixed_adjustments(rows, device, seed=rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_match_the_reference(device, dtype):
    for rows, vocabulary in SHAPES:
        logits = mixed_logits(rows, vocabulary, dtype, device)[:, 1:]
        token = torch.arange(rows, device=device) * 61
        check_logprobs(logits, token, mixed_num_top(rows, device))


def test_rows_of_nans_draw_a_token_and_disturb_no_others(device):
    check_rows_of_nans(device)


def test_truncated_samples_equal_the_references(device):
    rows = 100
    logits = mixed_logits(rows, WIDTH, torch.bfloat16, device)
    truncation = mixed_truncation(rows, device)
    threshold = check_truncation(logits, truncation)
    seed = torch.arange(rows, device=device) * 7919 - 3
    token = torch.full((rows,), -1, device=device)
    sample(logits, truncation.temperature_T, seed, seed + 3, token, threshold)
    expected = sample_reference(logits, truncation.temperature_T, seed, seed + 3, threshold)
    assert torch.equal(token, expected)
    assert (logits.gather(1, token[:, None])[:, 0].float() >= threshold).all()


def test_a_captured_draw_follows_its_parameters_and_repeats_bit_for_bit(gpu):
    rows = 96
    logits = mixed_logits(rows, WIDTH, torch.bfloat16, gpu)
    truncation, num_top = mixed_truncation(rows, gpu), mixed_num_top(rows, gpu)
    seed, token = torch.arange(rows, device=gpu), torch.zeros(rows, dtype=torch.int64, device=gpu)
    packed = packed_logprobs(rows, gpu)
    thresholds = torch.zeros(rows, device=gpu)

    def draw() -> None:
        ranked = rank(logits, num_top)
        thresholds.copy_(truncate(logits, *truncation))
        sample(logits, truncation.temperature_T, seed, seed, token, thresholds)
        write_logprobs(logits, ranked, token, num_top, unpacked(packed))

    draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw()
    for number in range(3):
        for values, others in zip(truncation, mixed_truncation(rows, gpu, number), strict=True):
            values.copy_(others)
        draw()
        outputs = (thresholds, token, packed)
        first = [output.clone() for output in outputs]
        for _ in range(TWENTY):
            for output in outputs:
                output.zero_()
            graph.replay()
            assert all(map(torch.equal, outputs, first))


ADJUSTED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "temperature": 1.0},
    {"frequency_penalty": 0.8, "top_logprobs": 2},
    {"logit_bias": {token_id: (token_id % 7 - 3) / 2 for token_id in range(3, 50)}},
    {
        "repetition_penalty": 0.8,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 2.5, 17: -100.0},
        "temperature": 1.4,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.01,
    },
    {"stop_token_ids": list(range(3, 13)), "min_tokens": 20, "temperature": 1.0},
    {"prompt_logprobs": 20},
    {"prompt_logprobs": 0, "repetition_penalty": 1.3, "top_logprobs": 0},
    {"temperature": 1.0},
    {},
]


def demo_engine(
    device: torch.device, directory: Path, dtype: DtypeName = "fp32", **config: Any
) -> EngineHarness:
    config = {"pool_pages": 4000} | config
    return EngineHarness(DEMO / "model", directory, device=device.type, dtype=dtype, **config)


def submit_all(
    harness: EngineHarness, num_requests: int = 48, sampling: list[dict[str, Any]] = SAMPLING
) -> list[int]:
    numbers = []
    for index, request in enumerate(REQUESTS[:num_requests]):
        adapter = DEMO / "adapters" / request["adapter"] if request["adapter"] else None
        prompt = TOKENIZER.encode(request["prompt"]).ids
        fields = {"stop_token_ids": []} | sampling[index % len(sampling)]
        numbers.append(harness.submit(prompt, adapter, 24, **fields))
    return numbers


def test_the_engine_draws_and_reports_as_on_a_cpu(device: torch.device, tmp_path: Path) -> None:
    on_cpu, here = demo_engine(torch.device("cpu"), tmp_path), demo_engine(device, tmp_path)
    for harness in (on_cpu, here):
        submit_all(harness)
        harness.run()
    assert here.tokens == on_cpu.tokens
    assert sum(map(len, here.logprobs.values())) == 24 * 18
    for number, expected in on_cpu.logprobs.items():
        rows = here.logprobs[number]
        chosen = [row.logprob for row in rows]
        np.testing.assert_allclose(chosen, [row.logprob for row in expected], atol=1e-3)
        for row, wanted in zip(rows, expected, strict=True):
            np.testing.assert_allclose(row.top_logprobs, wanted.top_logprobs, atol=1e-3)
            assert len(row.top_token_ids) == len(wanted.top_token_ids)
            assert row.top_token_ids[:1] == wanted.top_token_ids[:1]


@pytest.mark.parametrize("pool_pages", [4000, 60])
def test_the_engine_adjusts_as_on_a_cpu(
    device: torch.device, tmp_path: Path, pool_pages: int
) -> None:
    on_cpu = demo_engine(torch.device("cpu"), tmp_path)
    here = demo_engine(device, tmp_path, pool_pages=pool_pages, step_tokens=64)
    for harness in (on_cpu, here):
        submit_all(harness, sampling=ADJUSTED)
        harness.run()
    assert here.tokens == on_cpu.tokens
    assert (here.engine.status().preemptions > 0) is (pool_pages < 4000)
    plain = demo_engine(device, tmp_path)
    submit_all(plain, sampling=[{}])
    plain.run()
    assert sum(plain.tokens[number] != tokens for number, tokens in here.tokens.items()) > 10


def test_logprobs_of_prompts_are_those_of_a_cpu(device: torch.device, tmp_path: Path) -> None:
    on_cpu = demo_engine(torch.device("cpu"), tmp_path)
    here = demo_engine(device, tmp_path, step_tokens=64)
    for harness in (on_cpu, here):
        submit_all(harness, sampling=ADJUSTED)
        harness.run()
    assert sum(map(len, on_cpu.prompt_logprobs.values())) > 0
    for number, expected in on_cpu.prompt_logprobs.items():
        rows = here.prompt_logprobs[number]
        chosen = [row.logprob for row in rows]
        np.testing.assert_allclose(chosen, [row.logprob for row in expected], atol=1e-3)
        for row, wanted in zip(rows, expected, strict=True):
            np.testing.assert_allclose(row.top_logprobs, wanted.top_logprobs, atol=1e-3)
            assert row.top_token_ids[:1] == wanted.top_token_ids[:1]


def wait_for_loads(harness: EngineHarness) -> None:
    """Steps of equal requests hold the same rows, whatever their adapters' copies take."""
    runner: Any = harness.engine.runner
    runner.adapters = PatientLoads(runner.adapters)


def test_adjusted_requests_draw_and_report_the_same_bits(gpu, tmp_path: Path) -> None:
    first, second = (demo_engine(gpu, tmp_path, "bf16", pool_pages=8000) for _ in range(2))
    for harness in (first, second):
        wait_for_loads(harness)
        submit_all(harness, sampling=ADJUSTED + SAMPLING)
        harness.run()
    assert first.tokens == second.tokens
    assert first.logprobs == second.logprobs
    assert first.prompt_logprobs == second.prompt_logprobs


def test_adjusted_samples_do_not_depend_on_the_crowd(device, tmp_path: Path) -> None:
    prompt = TOKENIZER.encode(REQUESTS[0]["prompt"]).ids
    drawn = []
    for crowd in (0, 40):
        harness = demo_engine(device, tmp_path)
        submit_all(harness, crowd, ADJUSTED)
        numbers = [
            harness.submit(prompt, None, 20, seed=7, **({"stop_token_ids": []} | fields))
            for fields in (ADJUSTED if crowd else ADJUSTED[:1])
        ]
        harness.run()
        drawn.append(harness.tokens[numbers[0]])
    assert drawn[0] == drawn[1]


def test_the_same_requests_draw_and_report_the_same_bits(gpu, tmp_path: Path) -> None:
    first, second = (demo_engine(gpu, tmp_path, "bf16", pool_pages=8000) for _ in range(2))
    for harness in (first, second):
        wait_for_loads(harness)
        submit_all(harness)
        harness.run()
    assert first.tokens == second.tokens
    assert first.logprobs == second.logprobs


def test_truncated_samples_do_not_depend_on_the_crowd(device, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 2**64 - 3}
    prompt = TOKENIZER.encode(REQUESTS[0]["prompt"]).ids
    drawn = []
    for crowd in (0, 40):
        harness = demo_engine(device, tmp_path)
        submit_all(harness, crowd)
        number = harness.submit(prompt, None, 20, stop_token_ids=[], **fields)
        harness.run()
        drawn.append(harness.tokens[number])
    assert drawn[0] == drawn[1]


def test_logprobs_are_raw_where_stop_tokens_must_not_come_yet(device, tmp_path: Path) -> None:
    harness = demo_engine(device, tmp_path)
    prompt = TOKENIZER.encode(REQUESTS[0]["prompt"]).ids
    free = harness.submit(prompt, None, 4, stop_token_ids=[], top_logprobs=1)
    harness.run()
    stop = harness.tokens[free][0]
    fields: dict[str, Any] = {"stop_token_ids": [stop], "min_tokens": 4, "top_logprobs": 1}
    number = harness.submit(prompt, None, 4, **fields)
    harness.run()
    first = harness.logprobs[number][0]
    assert harness.tokens[number][0] != stop
    assert first.top_token_ids == [stop]
    assert first.logprob < first.top_logprobs[0]
    np.testing.assert_allclose(
        first.top_logprobs, harness.logprobs[free][0].top_logprobs, atol=1e-4
    )


def test_steps_that_adjust_truncate_and_report_never_wait_for_the_device(
    gpu, tmp_path: Path
) -> None:
    harness = demo_engine(gpu, tmp_path, "bf16", pool_pages=8000)
    prompt = TOKENIZER.encode(REQUESTS[0]["prompt"]).ids
    for fields in (SAMPLING + ADJUSTED) * 2:
        harness.submit(prompt, None, 100, **({"stop_token_ids": []} | fields))
    for _ in range(20):
        harness.step()
    for fields in ADJUSTED:  # they begin while nothing may wait
        harness.submit(prompt, None, 20, **({"stop_token_ids": []} | fields))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            harness.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    harness.run()
