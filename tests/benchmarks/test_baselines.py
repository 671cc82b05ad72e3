"""Baselines and the paper's settings run, on a model so small that the CPU is enough."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reproduction
from benchmarks.baselines import merged, packed, peft
from benchmarks.simulation.slora_recorded import recorded_trace
from tests.support.benchmark_model import TINY

COMMON = ("--device", "cpu", "--dtype", "fp32")
ENGINE = (
    *("--pool-gib", "0.05", "--max-running", "8", "--step-tokens", "64"),
    *("--max-context-tokens", "1024"),
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY))
    return model


@pytest.fixture
def run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a benchmark's main with options; returns the result that it wrote."""

    def called(module: Any, *options: str) -> dict[str, Any]:
        directory = tiny.parent / "results"
        fixed = ("--model", str(tiny), *COMMON, "--directory", str(directory))
        monkeypatch.setattr(sys, "argv", ["benchmark", *fixed, *options])
        module.main()
        [path] = directory.glob("**/*.json")
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    return called


def test_a_merged_adapter_draws_the_tokens_of_the_same_on_the_fly(run: Any) -> None:
    options = ("--requests", "3", "--adapters", "2", "--runs", "1", "--ranks", "4", "8")
    [case] = run(merged, *ENGINE, *options)["metrics"]["cases"]  # an error if tokens differ
    assert case["merged_req_per_s"]["median"] > 0
    assert case["on_the_fly_req_per_s"]["median"] > 0


def test_copies_share_the_pool_and_the_requests(tiny: Path) -> None:
    options = ("--requests", "4", "--runs", "1", "--ranks", "4")
    arguments = packed.parser().parse_args(["--model", str(tiny), *COMMON, *ENGINE, *options])
    copies = packed.measure(arguments, 2, packed=True)
    one = packed.measure(arguments, 2, packed=False)
    assert min(copies["req_per_s"]["median"], one["req_per_s"]["median"]) > 0
    assert (copies["pool_gib_of_each"], one["pool_gib_of_each"]) == (0.02, 0.05)


def test_peft_serves_one_adapter_or_several_in_a_batch(run: Any) -> None:
    options = ("--adapters", "3", "--ranks", "4", "8", "--requests", "4", "--batch", "2")
    metrics = run(peft, *options, "--seconds", "600")["metrics"]
    assert {mode: of["requests"] for mode, of in metrics.items()} == {"one_adapter": 4, "mixed": 4}
    assert metrics["mixed"]["batches"] == 2


def test_peft_stops_in_time(run: Any) -> None:
    options = ("--adapters", "2", "--ranks", "4", "--requests", "200", "--seconds", "0.001")
    metrics = run(peft, *options)["metrics"]
    assert all(of["batches"] <= 1 and of["requests"] < 200 for of in metrics.values())


def test_cells_of_the_papers_settings_are_served_at_their_times(run: Any) -> None:
    options = ("--settings", "s1", "--seconds", "0.1", "--cells", "1")
    [cell] = run(reproduction, *ENGINE, *options)["metrics"]["cells"]
    assert (cell["adapters"], cell["rate"]) == (5, 32)
    assert 0 <= cell["satisfaction"] <= cell["attainment"] <= 1
    assert cell["seconds"] > recorded_trace(5, 32, seconds=0.1)[-1].arrival_s


def test_the_papers_grids_fit_their_calls() -> None:
    """In ten minutes with a start of a minute, where draining takes half of a cell's time."""
    cells = {name: list(of.cells()) for name, of in reproduction.SETTINGS.items()}
    assert all(len(set(of)) == len(of) for of in cells.values())
    for together in (("s1", "s2"), ("s4",)):
        assert sum(len(cells[name]) for name in together) * 20 * 1.5 <= 9 * 60


def test_a_smaller_alpha_of_the_papers_generator_is_more_skewed() -> None:
    shares = []
    for alpha in (0.1, 0.3, 1.0):
        trace = recorded_trace(200, 100, alpha=alpha)
        shares.append(sum(request.adapter == 0 for request in trace) / len(trace))
    assert shares == pytest.approx([0.59, 0.2, 0.005], abs=0.02)
