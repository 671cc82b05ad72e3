"""The engine's answers to commands other than plain greedy requests."""

from pathlib import Path

import numpy as np
import pytest

from lorry.worker import messages as m
from lorry.worker.residency import AdapterState
from tests.support.engines import EngineHarness
from tests.support.models import make_adapter, make_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    return make_adapter(directory, model, seed=1, r=8, target_modules=["q_proj", "down_proj"])


def events_of(harness: EngineHarness, kind: type[m.Message]) -> list[m.Message]:
    return [event for event in harness.events if isinstance(event, kind)]


def test_seeded_samples_do_not_depend_on_the_crowd(model: Path, tmp_path: Path) -> None:
    prompt = [5, 6, 7]
    alone = EngineHarness(model, tmp_path)
    first = alone.submit(prompt, max_tokens=30, temperature=1.0, seed=2**64 - 3)
    alone.run()
    crowd = EngineHarness(model, tmp_path, step_tokens=64)
    others = [crowd.submit(prompt, max_tokens=30, temperature=1.5, seed=n) for n in range(20)]
    same = crowd.submit(prompt, max_tokens=30, temperature=1.0, seed=2**64 - 3)
    crowd.run()
    assert crowd.tokens[same] == alone.tokens[first]
    assert len({tuple(crowd.tokens[number]) for number in others}) > 15


def test_samples_follow_the_distribution_of_the_logits(model: Path, tmp_path: Path) -> None:
    harness = EngineHarness(model, tmp_path, max_running=128, step_tokens=512)
    numbers = [
        harness.submit([9, 9], max_tokens=1, temperature=2.0, seed=seed) for seed in range(2000)
    ]
    harness.run()
    drawn = np.bincount([harness.tokens[number][0] for number in numbers], minlength=320)
    expected = probabilities(model, [9, 9], temperature=2.0) * len(numbers)
    likely = expected >= 5
    chi_square = ((drawn - expected)[likely] ** 2 / expected[likely]).sum()
    # Mean n and variance 2n: five standard deviations above the mean.
    assert chi_square < likely.sum() + 5 * (2 * likely.sum()) ** 0.5
    assert drawn[likely].sum() > 0.9 * expected[likely].sum()


def probabilities(model: Path, prompt: list[int], temperature: float) -> np.ndarray:
    import torch
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0, -1]
    result: np.ndarray = (logits / temperature).softmax(0).double().numpy()
    return result


def test_resumed_request_draws_what_it_would_have_drawn(model: Path, tmp_path: Path) -> None:
    harness = EngineHarness(model, tmp_path)
    whole = harness.submit([5, 6, 7], max_tokens=20, temperature=1.0, seed=11)
    harness.run()
    drawn = harness.tokens[whole]
    resumed = harness.submit(
        [5, 6, 7, *drawn[:8]], max_tokens=20, temperature=1.0, seed=11, generated_tokens=8
    )
    harness.run()
    assert harness.tokens[resumed] == drawn[8:]
    assert harness.finished[resumed].prompt_tokens == 3
    assert harness.finished[resumed].completion_tokens == len(drawn)


def test_prefetched_adapter_needs_no_wait(model: Path, adapter: Path, tmp_path: Path) -> None:
    harness = EngineHarness(model, tmp_path)
    version = harness.version_of(adapter)
    harness.engine.handle([m.Prefetch([version])])
    for _ in range(3):
        harness.step()
    [*_, residency] = events_of(harness, m.ResidencyChange)
    assert isinstance(residency, m.ResidencyChange)
    assert residency.gpu_added == [version]
    number = harness.submit([5, 6], adapter)
    harness.run()
    assert harness.finished[number].adapter_load_s == 0.0


def test_an_engine_tells_when_it_waits_for_nothing_but_loads(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness = EngineHarness(model, tmp_path)
    harness.step()
    assert not harness.engine.awaits_only_loads
    harness.submit([5, 6, 7], adapter, max_tokens=2)
    waits = list[bool]()
    while not harness.finished:
        harness.step()
        waits.append(harness.engine.awaits_only_loads)
    assert waits.count(True) == 1
    harness.submit([5, 6, 7], max_tokens=20)
    harness.step()
    harness.submit([5, 6, 7], adapter, max_tokens=2)
    for _ in range(4):
        harness.step()
        assert not harness.engine.awaits_only_loads


def test_pin_answers_once_resident_and_keeps_the_adapter(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness = EngineHarness(model, tmp_path)
    version = harness.version_of(adapter)
    harness.engine.handle([m.PinAdapter(1, version)])
    for _ in range(4):
        harness.step()
    harness.engine.handle([m.EvictAdapter(2, version)])
    harness.engine.handle([m.UnpinAdapter(3, version), m.EvictAdapter(4, version)])
    harness.step()
    assert results_of(harness) == {1: None, 2: "ADAPTER_IN_USE", 3: None, 4: None}
    assert events_of(harness, m.ReleaseImage) == [m.ReleaseImage(version)]
    assert harness.engine.scheduler.residency.find(version) is None


def results_of(harness: EngineHarness) -> dict[int, str | None]:
    """The failure of each answered command, by call."""
    return {
        event.call: event.failure.reason if event.failure else None
        for event in events_of(harness, m.AdminResult)
        if isinstance(event, m.AdminResult)
    }


def harness_with_a_pin_under_way(
    model: Path, adapter: Path, tmp_path: Path
) -> tuple[EngineHarness, bytes]:
    """By call 1, and the version that it waits for."""
    harness = EngineHarness(model, tmp_path)
    version = harness.version_of(adapter)
    harness.engine.handle([m.PinAdapter(1, version)])
    harness.step()
    return harness, version


def test_unpin_ends_a_pin_that_still_waits_for_its_adapter(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness, version = harness_with_a_pin_under_way(model, adapter, tmp_path)
    harness.engine.handle([m.UnpinAdapter(2, version), m.Prefetch([version])])
    for _ in range(4):
        harness.step()
    assert results_of(harness) == {1: "SUPERSEDED", 2: None}
    loaded = harness.engine.scheduler.residency.find(version)
    assert loaded is not None
    assert loaded.is_idle


@pytest.mark.parametrize("state", [AdapterState.FETCHING, AdapterState.LOADING])
def test_eviction_of_an_adapter_on_its_way_is_done_once_it_is_here(
    model: Path, adapter: Path, tmp_path: Path, state: AdapterState
) -> None:
    harness = EngineHarness(model, tmp_path)
    version = harness.version_of(adapter)
    residency = harness.engine.scheduler.residency
    harness.engine.handle([m.Prefetch([version])])
    harness.engine.step()
    if state is AdapterState.LOADING:
        harness.engine.handle([harness.image(version)])
        harness.engine.step()
    on_its_way = residency.find(version)
    assert on_its_way is not None
    assert on_its_way.state is state
    harness.engine.handle([m.Prefetch([]), m.EvictAdapter(1, version)])
    assert not any(isinstance(event, m.AdminResult) for event in harness.engine.take_events())
    if state is AdapterState.FETCHING:
        harness.engine.handle([harness.image(version)])
    for _ in range(3):
        harness.step()
    assert results_of(harness) == {1: None}
    assert events_of(harness, m.ReleaseImage) == [m.ReleaseImage(version)]
    assert residency.find(version) is None


def test_eviction_of_an_adapter_that_a_pin_waits_for_is_refused(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness, version = harness_with_a_pin_under_way(model, adapter, tmp_path)
    harness.engine.handle([m.EvictAdapter(2, version)])
    for _ in range(4):
        harness.step()
    assert results_of(harness) == {1: None, 2: "ADAPTER_IN_USE"}


def test_pin_that_finds_no_room_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    harness = EngineHarness(model, tmp_path, pool_pages=1)
    harness.engine.handle([m.PinAdapter(1, harness.version_of(adapter))])
    for _ in range(4):
        harness.step()
    [result] = events_of(harness, m.AdminResult)
    assert isinstance(result, m.AdminResult)
    assert result.failure is not None
    assert result.failure.reason == "POOL_TOO_SMALL"


def test_reclaimed_image_is_released_and_fetched_again_when_needed(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness = EngineHarness(model, tmp_path)
    version = harness.version_of(adapter)
    first = harness.submit([5, 6], adapter)
    harness.run()
    harness.engine.handle([m.ReclaimImage(version), m.EvictAdapter(1, version)])
    second = harness.submit([5, 6], adapter)
    harness.run()
    assert harness.tokens[first] == harness.tokens[second]
    assert events_of(harness, m.FetchImage) == [m.FetchImage(version)] * 2
    assert events_of(harness, m.ReleaseImage) == [m.ReleaseImage(version)]


def test_image_that_cannot_be_mapped_ends_only_its_requests(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness = EngineHarness(model, tmp_path)
    version = harness.version_of(adapter)
    image = harness.image(version)
    number = harness.submit([5, 6], adapter)
    harness.engine.step()
    Path(image.path).unlink()
    harness.engine.handle([image])
    other = harness.submit([5, 6])
    harness.run()
    failure = harness.finished[number].failure
    assert failure is not None
    assert failure.reason == "STORE_UNAVAILABLE"
    assert harness.finished[other].failure is None


def test_late_image_of_a_forgotten_fetch_is_released(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness = EngineHarness(model, tmp_path)
    image = harness.image(harness.version_of(adapter))
    harness.engine.handle([image])
    harness.step()
    assert events_of(harness, m.ReleaseImage) == [m.ReleaseImage(image.version)]


def test_status_counts_what_there_is(model: Path, adapter: Path, tmp_path: Path) -> None:
    harness = EngineHarness(model, tmp_path, max_running=2, pool_pages=100)
    for _ in range(4):
        harness.submit([5] * 20, adapter, max_tokens=50, stop_token_ids=[])
    for _ in range(4):
        harness.step()
    status = harness.engine.status()
    assert (status.running, status.waiting) == (2, 2)
    assert status.queued_prompt_tokens == 40
    assert status.pages_free + status.pages_kv + status.pages_adapter == status.pages_total == 100
    assert status.pages_kv == 4
    assert status.adapter_loads == 1
    assert status.prefill_tokens_per_s > 0
    assert status.adapter_load_bytes_per_s > 0


def test_measured_rates_are_of_whole_steps(model: Path, tmp_path: Path) -> None:
    harness = EngineHarness(model, tmp_path)
    ticks = iter(range(10_000))
    harness.engine._clock = lambda: float(next(ticks))  # every look at the clock is a second later
    for _ in range(3):
        harness.submit([5] * 20, max_tokens=5)
    harness.run()
    status = harness.engine.status()
    assert 0 < status.prefill_tokens_per_s <= 60
    assert status.step_times_ms[4] >= 1000
