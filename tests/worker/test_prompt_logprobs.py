"""Logprobs of prompts against transformers + peft, and the head that computes them on a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorry.kernels.logprobs import MAX_TOP, logprobs_reference, unpacked
from lorry.worker import messages as m
from lorry.worker.device_vocabulary import WholeDeviceVocabulary
from lorry.worker.prompt_head import PIECE_ROWS, PromptHead
from lorry.worker.prompt_rows import PromptTargets
from tests.support.engines import EngineHarness
from tests.support.models import Reference, make_adapter, make_llama

VOCABULARY = 320
LENGTHS = [1, 2, 15, 16, 17, 40, 130, 300]


class World:
    def __init__(self, directory: Path) -> None:
        self.model = make_llama(directory / "model", num_hidden_layers=2, vocab_size=VOCABULARY)
        fields: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "down_proj"]}
        self.adapter = make_adapter(directory / "adapter", self.model, seed=1, **fields)
        self.reference = Reference(self.model)
        self.adapters = (None, self.adapter)
        random = np.random.default_rng(0)
        self.prompts = [random.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]

    def cases(self) -> Iterator[tuple[list[int], Path | None, int | None]]:
        for index, prompt in enumerate(self.prompts):
            yield prompt, self.adapters[index % 2], [0, 1, 20, None, 5][index % 5]

    def submit_all(self, harness: EngineHarness, max_tokens: int = 4) -> list[int]:
        return [
            harness.submit(prompt, adapter, max_tokens, stop_token_ids=[], prompt_logprobs=num_top)
            for prompt, adapter, num_top in self.cases()
        ]

    def check_all(self, harness: EngineHarness, numbers: list[int]) -> None:
        for number, (prompt, adapter, num_top) in zip(numbers, self.cases(), strict=True):
            rows = harness.prompt_logprobs[number]
            if num_top is None:
                assert rows == []
            else:
                self.check(rows, prompt, adapter, num_top)

    def check(
        self, rows: list[m.RowLogprobs], prompt: list[int], adapter: Path | None, num_top: int
    ) -> None:
        logprobs = self.reference.logits(prompt, adapter)[:-1].log_softmax(dim=1)
        chosen = logprobs[range(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose([row.logprob for row in rows], chosen, atol=1e-4)
        for row, expected in zip(rows, logprobs, strict=True):
            top = expected.topk(num_top)
            assert row.top_token_ids == top.indices.tolist()
            np.testing.assert_allclose(row.top_logprobs, top.values, atol=1e-4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("step_tokens", [16, 1024])
def test_logprobs_of_prompts_are_those_of_transformers_and_peft(
    world: World, tmp_path: Path, step_tokens: int, max_in_flight: int
) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=step_tokens, max_running=8)
    runner: Any = harness.engine.runner
    runner.max_in_flight = max_in_flight
    numbers = world.submit_all(harness)
    harness.run()
    world.check_all(harness, numbers)


def test_asking_for_them_changes_no_token(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path)
    asking = world.submit_all(harness, 20)
    plain = [
        harness.submit(prompt, adapter, 20, stop_token_ids=[])
        for prompt, adapter, _ in world.cases()
    ]
    harness.run()
    for number, other in zip(asking, plain, strict=True):
        assert harness.tokens[number] == harness.tokens[other]


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_preempted_requests_report_each_prompt_token_once(
    world: World, tmp_path: Path, max_in_flight: int
) -> None:
    """The newest has a long prompt, of which little is computed in a step, while others grow."""
    harness = EngineHarness(world.model, tmp_path, step_tokens=8, max_running=8, pool_pages=45)
    runner: Any = harness.engine.runner
    runner.max_in_flight = max_in_flight
    prompt = world.prompts[-1]
    for _ in range(6):
        harness.submit(world.prompts[1], None, 100, stop_token_ids=[])
    number = harness.submit(prompt, None, 4, stop_token_ids=[], prompt_logprobs=3)
    while not harness.engine.status().preemptions:
        harness.step()
    assert 0 < len(harness.prompt_logprobs[number]) < len(prompt) - 1
    harness.run()
    world.check(harness.prompt_logprobs[number], prompt, None, 3)


def test_a_request_that_resumes_reports_its_prompt_and_not_its_output(
    world: World, tmp_path: Path
) -> None:
    harness = EngineHarness(world.model, tmp_path)
    prompt = world.prompts[4]
    whole = harness.submit(prompt, None, 8, stop_token_ids=[])
    harness.run()
    tokens = harness.tokens[whole]
    resumed = harness.submit(
        [*prompt, *tokens[:3]],
        None,
        8,
        stop_token_ids=[],
        generated_tokens=3,
        prompt_logprobs=2,
    )
    harness.run()
    assert harness.tokens[resumed] == tokens[3:]
    world.check(harness.prompt_logprobs[resumed], prompt, None, 2)


def test_a_prompt_that_the_prefix_cache_holds_is_computed_for_them(
    world: World, tmp_path: Path
) -> None:
    harness = EngineHarness(world.model, tmp_path)
    prompt = world.prompts[-1]
    plain = harness.submit(prompt, None, 4, stop_token_ids=[])
    harness.run()
    asking = harness.submit(prompt, None, 4, stop_token_ids=[], prompt_logprobs=1)
    again = harness.submit(prompt, None, 4, stop_token_ids=[])
    harness.run()
    world.check(harness.prompt_logprobs[asking], prompt, None, 1)
    assert harness.finished[asking].cached_tokens == 0
    assert harness.finished[again].cached_tokens > 0, "others share it"
    assert harness.tokens[asking] == harness.tokens[plain] == harness.tokens[again]


def test_a_cancelled_request_reports_nothing_more(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=16, max_running=8)
    number = harness.submit(world.prompts[-1], None, 4, prompt_logprobs=1)
    other = harness.submit(world.prompts[5], None, 4, prompt_logprobs=1)
    for _ in range(3):
        harness.step()
    harness.engine.handle([m.Cancel([number])])
    harness.run()
    assert len(harness.prompt_logprobs[number]) <= 3 * 16
    world.check(harness.prompt_logprobs[other], world.prompts[5], None, 1)


def test_a_row_that_changes_hands_reports_nothing_of_who_had_it(
    world: World, tmp_path: Path
) -> None:
    """The step in flight is the cancelled request's; the next one is in its row already."""
    harness = EngineHarness(world.model, tmp_path, step_tokens=16, max_running=1)
    runner: Any = harness.engine.runner
    runner.max_in_flight = 2
    first = harness.submit(world.prompts[-1], None, 4, prompt_logprobs=1)
    second = harness.submit(world.prompts[6], None, 4, prompt_logprobs=1)
    for _ in range(3):
        harness.step()
    harness.engine.handle([m.Cancel([first])])
    harness.run()
    assert len(harness.prompt_logprobs[first]) == 2 * 16
    world.check(harness.prompt_logprobs[second], world.prompts[6], None, 1)


class Vocabulary:
    """A head whose logits are its hidden states; it notes how many rows it is given at a time."""

    def __init__(self) -> None:
        self.most_rows = 0

    def logits(self, x_NH: torch.Tensor) -> torch.Tensor:
        self.most_rows = max(self.most_rows, len(x_NH))
        return x_NH.clone()


@pytest.mark.parametrize("rows", [1, PIECE_ROWS, PIECE_ROWS + 1, 150])
def test_the_captured_head_reports_like_the_reference_in_bounded_pieces(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("lorry.worker.prompt_head.to_host", torch.Tensor.clone)  # not pinned here
    torch.manual_seed(rows)
    hidden = torch.randn(200, 500) * 3
    targets = PromptTargets(
        np.random.default_rng(rows).permutation(200)[:rows],
        np.arange(rows) * 3,
        np.arange(rows) % (MAX_TOP + 1),
    )
    model = Vocabulary()
    head = PromptHead(model, hidden, WholeDeviceVocabulary())
    actual = unpacked(head.launch(targets, head.run))
    step_row, token, num_top = (torch.from_numpy(part) for part in targets)
    wanted = logprobs_reference(hidden[step_row], token, num_top)
    torch.testing.assert_close(actual.chosen_T, wanted.chosen_T)
    places = torch.arange(MAX_TOP) < num_top[:, None]
    assert torch.equal(actual.top_id_TX[places], wanted.top_id_TX[places])
    torch.testing.assert_close(actual.top_logprob_TX[places], wanted.top_logprob_TX[places])
    assert model.most_rows == PIECE_ROWS
