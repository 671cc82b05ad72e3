"""The engine answers like transformers + peft whatever it takes from the prefix cache."""

from pathlib import Path

import pytest

from lorry.worker.torch_runner import TorchRunner
from tests.support.engines import EngineHarness
from tests.support.equal_tokens import (
    MAX_TOKENS,
    MODELS,
    PrefixWorld,
    check_answers,
    largest_adapter_pages,
)
from tests.support.models import first_difference


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PrefixWorld:
    return PrefixWorld(
        tmp_path_factory.mktemp("model"), MODELS["gqa-tied"], adapters=["r3", "r16-rslora", "r256"]
    )


def hit_tokens(harness: EngineHarness) -> int:
    return harness.engine.status().prefix_hit_tokens


@pytest.mark.parametrize(
    ("step_tokens", "max_running", "max_in_flight"), [(1024, 64, 1), (64, 64, 2), (13, 8, 2)]
)
def test_shared_prefixes_leave_no_trace_in_the_tokens(
    world: PrefixWorld, tmp_path: Path, step_tokens: int, max_running: int, max_in_flight: int
) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=step_tokens, max_running=max_running)
    assert isinstance(harness.engine.runner, TorchRunner)
    harness.engine.runner.max_in_flight = max_in_flight
    for _ in range(2):
        check_answers(world, harness)
    lengths = [len(prompt) for prompt, *_ in world.requests]
    # The second time, everything but each prompt's last page, or what there is of it.
    assert hit_tokens(harness) >= sum((length - 1) // 16 * 16 for length in lengths)


def test_evicted_prefixes_leave_no_trace_in_the_tokens(world: PrefixWorld, tmp_path: Path) -> None:
    pages = largest_adapter_pages(world, tmp_path) + 24
    harness = EngineHarness(world.model, tmp_path, step_tokens=64, pool_pages=pages)
    for _ in range(2):
        check_answers(world, harness)
    status = harness.engine.status()
    assert status.prefix_hit_tokens > 0
    assert status.prefix_evictions > 0
    assert status.adapter_evictions > 0


def test_shared_prefixes_and_preemption_leave_no_trace_in_the_tokens(
    world: PrefixWorld, tmp_path: Path
) -> None:
    pages = largest_adapter_pages(world, tmp_path) + 16
    harness = EngineHarness(world.model, tmp_path, step_tokens=32, pool_pages=pages)
    assert isinstance(harness.engine.runner, TorchRunner)
    harness.engine.runner.max_in_flight = 2
    check_answers(world, harness, copies=6, longest=70)
    status = harness.engine.status()
    assert status.prefix_hit_tokens > 0
    assert status.preemptions > 0


@pytest.mark.parametrize("in_turn", [True, False])
def test_no_prefix_crosses_versions_or_tenants(
    world: PrefixWorld, tmp_path: Path, in_turn: bool
) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=64)
    same = [request for request in world.requests if len(request[0]) == 70]
    cases = [(tenant, *request) for tenant in ("one", "two") for request in same]
    numbers = []
    for tenant, prompt, adapter, _ in cases:
        numbers.append(harness.submit(prompt, adapter, MAX_TOKENS, tenant=tenant))
        if in_turn:
            harness.run()
    harness.run()
    for number, (_, _, adapter, expected) in zip(numbers, cases, strict=True):
        assert first_difference(expected, harness.tokens[number]) is None, f"{adapter}"
        assert harness.finished[number].cached_tokens == 0
    assert hit_tokens(harness) == 0
    for tenant, prompt, adapter, expected in cases:
        number = harness.submit(prompt, adapter, MAX_TOKENS, tenant=tenant)
        harness.run()
        assert first_difference(expected, harness.tokens[number]) is None
        assert harness.finished[number].cached_tokens == 64


def test_a_new_version_of_a_name_takes_nothing_from_the_old_one_that_still_runs(
    world: PrefixWorld, tmp_path: Path
) -> None:
    """A name is updated while its requests run: each has the version that it came with."""
    harness = EngineHarness(world.model, tmp_path, step_tokens=64)
    (prompt, old, _), (_, new, _) = [r for r in world.requests if len(r[0]) == 70][1:3]
    answers = {adapter: e for p, adapter, e in world.requests if p == prompt}
    numbers = list[tuple[int, Path | None]]()
    for adapter in [old] * 4 + [new] * 4:
        numbers.append((harness.submit(prompt, adapter, MAX_TOKENS), adapter))
        for _ in range(4):
            harness.step()
    assert not harness.finished
    harness.run()
    for number, adapter in numbers:
        assert first_difference(answers[adapter], harness.tokens[number]) is None
    cached = [harness.finished[number].cached_tokens for number, _ in numbers]
    assert cached == [0, 64, 64, 64] * 2


def test_a_request_goes_on_from_its_cached_output(world: PrefixWorld, tmp_path: Path) -> None:
    """As after the loss of a worker that another has heard the same from."""
    harness = EngineHarness(world.model, tmp_path, step_tokens=64)
    for prompt, adapter, expected in world.requests[:9]:
        harness.submit(prompt, adapter, MAX_TOKENS)
        harness.run()
        sent = expected.token_ids[: len(expected.token_ids) - 3]
        number = harness.submit(prompt + sent, adapter, MAX_TOKENS, generated_tokens=len(sent))
        harness.run()
        assert sent + harness.tokens[number] == expected.token_ids
        assert harness.finished[number].cached_tokens == min(
            len(prompt), (len(prompt) + len(sent) - 1) // 16 * 16
        )
