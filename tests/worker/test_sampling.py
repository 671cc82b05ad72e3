"""Truncated sampling and logprobs of the engine against transformers + peft."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorry.kernels.adjustments import Adjustments, adjust_reference
from lorry.kernels.logprobs import MAX_TOP, logprobs_reference, unpacked
from lorry.kernels.sampling import sample_reference
from lorry.kernels.truncation import truncation_reference
from lorry.worker.device_vocabulary import WholeDeviceVocabulary
from lorry.worker.messages import RowLogprobs
from lorry.worker.sequence_adjustments import SequenceAdjustments
from lorry.worker.step_arrays import HeadKind
from lorry.worker.step_buffers import FIELDS, PADDING
from lorry.worker.step_head import StepHead
from tests.support.engines import EngineHarness
from tests.support.models import Reference, make_adapter, make_llama
from tests.support.sampling_cases import mixed_num_top, mixed_truncation
from tests.support.warped_draws import drawn

MAX_TOKENS = 24
PROMPT = [5, 6, 7, 11]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 1},
    {"temperature": 1.0, "top_k": 200, "top_p": 0.5},
    {"temperature": 1.0},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.2},
]


class World:
    def __init__(self, directory: Path) -> None:
        self.model = make_llama(directory / "model", num_hidden_layers=2)
        fields: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "down_proj"]}
        self.adapter = make_adapter(directory / "adapter", self.model, seed=1, **fields)
        self.reference = Reference(self.model)
        self.adapters = (None, self.adapter)

    def logits(self, tokens: list[int], adapter: Path | None) -> torch.Tensor:
        """What each of `tokens`, the answer to PROMPT, was drawn from."""
        logits = self.reference.logits([*PROMPT, *tokens], adapter)
        return logits[len(PROMPT) - 1 : -1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def cases(world: World) -> Iterator[tuple[dict[str, Any], Path | None, int]]:
    for index, fields in enumerate(SAMPLING * 2):
        yield fields, world.adapters[index % 2], 1000 + index


def test_one_batch_of_all_mixes_draws_what_transformers_leaves(
    world: World, tmp_path: Path
) -> None:
    harness = EngineHarness(world.model, tmp_path)
    numbers = [
        harness.submit(PROMPT, adapter, MAX_TOKENS, seed=seed, stop_token_ids=[], **fields)
        for fields, adapter, seed in cases(world)
    ]
    harness.run()
    for number, (fields, adapter, seed) in zip(numbers, cases(world), strict=True):
        tokens = harness.tokens[number]
        assert tokens == drawn(world.logits(tokens, adapter), fields, seed), fields
        free = {"temperature": fields["temperature"]}
        if len(fields) > 1 and fields["temperature"] > 0:
            assert tokens != drawn(world.logits(tokens, adapter), free, seed)


def test_truncated_samples_do_not_depend_on_the_crowd(world: World, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 2**64 - 3}
    alone = EngineHarness(world.model, tmp_path)
    first = alone.submit(PROMPT, None, MAX_TOKENS, **fields)
    alone.run()
    crowd = EngineHarness(world.model, tmp_path, step_tokens=64)
    for seed in range(20):
        others = {"temperature": 1.5, "top_p": 0.3 + seed / 40, "top_logprobs": seed}
        crowd.submit(PROMPT, None, MAX_TOKENS, seed=seed, **others)
    same = crowd.submit(PROMPT, None, MAX_TOKENS, **fields)
    crowd.run()
    assert crowd.tokens[same] == alone.tokens[first]


def check_logprobs(rows: list[RowLogprobs], tokens: list[int], logits: torch.Tensor) -> None:
    logprobs = logits.log_softmax(dim=1)
    chosen = logprobs[range(len(tokens)), tokens]
    np.testing.assert_allclose([row.logprob for row in rows], chosen, atol=1e-4)
    for row, expected in zip(rows, logprobs, strict=True):
        top = expected.topk(len(row.top_token_ids))
        assert row.top_token_ids == top.indices.tolist()
        np.testing.assert_allclose(row.top_logprobs, top.values, atol=1e-4)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_logprobs_are_those_of_transformers_and_peft(
    world: World, tmp_path: Path, max_in_flight: int
) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=64)
    runner: Any = harness.engine.runner
    runner.max_in_flight = max_in_flight
    asked: dict[int, tuple[int | None, Path | None]] = {}
    for index, num_top in enumerate([None, 0, 1, 20, None, 7]):
        adapter = world.adapters[index % 2]
        sampling = SAMPLING[index]
        number = harness.submit(PROMPT, adapter, MAX_TOKENS, top_logprobs=num_top, **sampling)
        asked[number] = (num_top, adapter)
    harness.run()
    for number, (num_top, adapter) in asked.items():
        rows, tokens = harness.logprobs[number], harness.tokens[number]
        if num_top is None:
            assert rows == []
        else:
            assert [len(row.top_token_ids) for row in rows] == [num_top] * len(tokens)
            check_logprobs(rows, tokens, world.logits(tokens, adapter))


def test_logprobs_are_raw_where_stop_tokens_must_not_come_yet(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path)
    free = harness.submit(PROMPT, None, 4, stop_token_ids=[])
    harness.run()
    stop = harness.tokens[free][0]
    number = harness.submit(PROMPT, None, 4, stop_token_ids=[stop], min_tokens=4, top_logprobs=2)
    harness.run()
    rows, tokens = harness.logprobs[number], harness.tokens[number]
    assert rows[0].top_token_ids == [stop, tokens[0]]
    check_logprobs(rows, tokens, world.logits(tokens, None))


def test_preempted_requests_report_each_token_once(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=64, pool_pages=20)
    numbers = [
        harness.submit(PROMPT, None, 60, temperature=1.0, top_logprobs=1, stop_token_ids=[])
        for _ in range(12)
    ]
    harness.run()
    assert harness.engine.status().preemptions > 0
    for number in numbers:
        tokens = harness.tokens[number]
        assert len(harness.logprobs[number]) == len(tokens) == 60
        check_logprobs(harness.logprobs[number], tokens, world.logits(tokens, None))


class Vocabulary:
    """A head whose logits are its hidden states."""

    def logits(self, x_NH: torch.Tensor) -> torch.Tensor:
        return x_NH.clone()


def test_the_captured_heads_draw_and_report_like_the_references() -> None:
    """Each head on the buffers of a padded step, in the kernels' interpreter."""
    samples, padded, vocabulary = 10, 16, 500
    torch.manual_seed(0)
    hidden = torch.randn(40, vocabulary) * 3
    buffers = {
        name: torch.full((padded,), PADDING.get(name, 0), dtype=torch.from_numpy(_of(field)).dtype)
        for name, field in FIELDS.items()
    }
    rows = mixed_truncation(samples, hidden.device)
    num_top = mixed_num_top(samples, hidden.device)
    filled = dict(zip(("temperature", "top_k", "top_p", "min_p"), rows, strict=True))
    filled |= {"num_top": num_top, "seed": torch.arange(samples) - 3}
    filled |= {"sample_row": torch.arange(samples) * 2 + 1, "state_row": torch.arange(samples)}
    buffers["state_row"].fill_(padded)
    for name, values in filled.items():
        buffers[name][:samples] = values
    adjustments = SequenceAdjustments(padded, vocabulary, hidden.device)
    applied = mixed_adjustments(adjustments, samples)
    logits = hidden[filled["sample_row"]]
    adjusted = adjust_reference(logits, adjustments.tables, applied)
    for kind, drawn_from, is_cut in (
        (HeadKind.PLAIN, logits, False),
        (HeadKind.FULL, logits, True),
        (HeadKind.ADJUSTED, adjusted, True),
    ):
        counts = adjustments.tables.count_RV.clone()
        head = StepHead(
            Vocabulary(), buffers, hidden, adjustments, WholeDeviceVocabulary(), max_samples=padded
        )
        head.run(padded, kind)
        least = truncation_reference(drawn_from, *rows) if is_cut else None
        expected = sample_reference(
            drawn_from, rows.temperature_T, filled["seed"], torch.zeros(samples), least
        )
        assert torch.equal(head.token_N[:samples], expected)
        assert torch.equal(head.last_token_R[:samples], expected)
        if kind is not HeadKind.PLAIN:
            check_report(head, logits, expected, num_top)
        if kind is HeadKind.ADJUSTED:
            counts[range(samples), expected] += 2 * applied.counts_T.int()
        assert torch.equal(adjustments.tables.count_RV, counts)


def mixed_adjustments(adjustments: SequenceAdjustments, samples: int) -> Adjustments:
    """Put penalties, biases and bans, each in some rows, where the heads find them."""
    rows = torch.arange(samples)
    tables = adjustments.tables
    tables.count_RV[:samples] = torch.randint(0, 4, (samples, tables.count_RV.shape[1])).int()
    tables.bias_id_RB[:samples, :5] = torch.arange(5).int() * 7
    tables.bias_RB[:samples, :5] = torch.randn(samples, 5) * 5
    tables.banned_id_RX[:samples, :40] = torch.arange(40).int() * 3
    applied = adjustments.of(rows)
    applied.repetition_T[::2] = 1.5
    applied.presence_T[::3] = 0.75
    applied.frequency_T[1::4] = -0.25
    applied.num_biases_T[::2] = 5
    applied.num_banned_T[1::3] = 40
    return applied


def check_report(
    head: StepHead, logits: torch.Tensor, token: torch.Tensor, num_top: torch.Tensor
) -> None:
    reported = unpacked(head.logprobs_NY[: len(logits)])
    wanted = logprobs_reference(logits, token, num_top)
    asked, places = num_top >= 0, torch.arange(MAX_TOP) < num_top[:, None]
    torch.testing.assert_close(reported.chosen_T[asked], wanted.chosen_T[asked])
    assert torch.equal(reported.top_id_TX[places], wanted.top_id_TX[places])


def _of(field: Any) -> np.ndarray:
    return np.empty(0, dtype=field.dtype)
