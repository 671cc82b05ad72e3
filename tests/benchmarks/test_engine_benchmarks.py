"""The engine's benchmarks run, on a model so small that the CPU is enough."""

import json
import subprocess
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation
from benchmarks.building import build, model_of
from benchmarks.card import products_of
from benchmarks.figures import figures, measurements_text
from benchmarks.variants import variants_on
from lorry.client.bench.trace import TraceSpec, make_trace
from lorry.worker.step_graphs import StepGraphs
from tests.support.benchmark_model import TINY
from tests.support.command import REPO

ENGINE = [
    *("--device", "cpu", "--dtype", "fp32", "--pool-gib", "0.05", "--ranks", "4", "8"),
    *("--max-running", "8", "--step-tokens", "64", "--max-context-tokens", "1024"),
]

USES = ("kv", "prefix", "adapter", "free")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY))
    return directory


def run(name: str, tiny: Path, *options: str, common: Sequence[str] = ENGINE) -> dict[str, Any]:
    """The one result file that a benchmark writes; README or the page of measurements has words for
    most of them."""
    directory = tiny.parent / "results"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--model", str(tiny), *common]
    subprocess.run(
        [*command, "--directory", str(directory), *options], cwd=REPO, check=True, timeout=600
    )
    [path] = directory.glob("**/*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    told = figures(directory) + measurements_text(directory)
    assert (result["device"] in told) == (name not in ("products", "ablation"))
    return result


def test_a_trace_ends_every_request_at_its_length(tiny: Path) -> None:
    options = ("--requests", "4", "--adapters", "3", "--runs", "1")
    result = run("engine", tiny, *options)
    metrics, split = result["metrics"], result["metrics"]["pool_pages"]
    assert metrics["req_per_s"] > 0
    totals = {sum(of) for of in zip(*(split[use] for use in USES), strict=True)}
    assert len(totals) == 1, "pages were lost"
    assert max(split["kv"]) > 0 < max(split["adapter"])
    assert split["time_s"] == sorted(split["time_s"])
    assert metrics["adapter_loads"] == 2
    assert metrics["latency_s"]["p99"] <= metrics["seconds"]


def test_requests_may_come_at_their_arrivals(tiny: Path) -> None:
    options = ("--requests", "4", "--adapters", "3", "--runs", "1", "--arrivals", "--rate", "8")
    result = run("engine", tiny, *options)
    trace = make_trace(TraceSpec(requests=4, adapters=3, rate=8.0))
    assert result["metrics"]["seconds"] > trace[-1].arrival_s > 0.2
    # Times count from a request's own arrival, which the last one's is long after the start.
    assert 0 < result["metrics"]["ttft_s"]["p50"] < result["metrics"]["latency_s"]["p50"]
    assert result["metrics"]["ttft_s"]["p99"] < result["metrics"]["seconds"]
    assert result["config"]["rate"] == 8.0


def test_every_variant_serves_the_same_trace_where_memory_binds(tiny: Path) -> None:
    options = (
        *("--requests", "6", "--adapters", "6", "--runs", "1", "--alpha", "0"),
        *("--pool-gib", "0.0005", "--ranks", "32", "64"),
    )
    metrics = run("ablation", tiny, *options)["metrics"]
    assert metrics.keys() == variants_on("cpu", 0.25).keys()
    assert all(of["adapter_evictions"] > 0 for of in metrics.values())
    assert metrics["padded ranks"]["adapter_loads"] >= metrics["whole engine"]["adapter_loads"]


def test_a_split_pool_must_have_room_for_the_largest_adapter(tiny: Path) -> None:
    options = ("--pool-gib", "0.0005", "--ranks", "64", "--adapter-share", "0.01")
    arguments = ablation.parser().parse_args(["--model", str(tiny), *ENGINE, *options])
    engine, _ = build(arguments, *model_of(arguments))
    with pytest.raises(SystemExit, match=r"0\.01 is 1 pages, but an adapter of rank 64 has"):
        ablation.measure(engine, arguments)


def test_a_step_may_be_launched_as_it_is_replayed() -> None:
    assert signature(StepGraphs.launch) == signature(StepGraphs.replay)


def test_every_case_of_a_step_is_measured_around_its_context(tiny: Path) -> None:
    options = ("--batch", "1", "4", "--context", "100", "400", "--adapters", "0", "2")
    cases = run("step", tiny, *options)["metrics"]["cases"]
    columns = ("context", "batch", "adapters", "rank")
    assert [tuple(case[name] for name in columns) for case in cases] == [
        (context, *case)
        for context in (100, 400)
        for case in [(1, 0, 0), (4, 0, 0), (4, 2, 4), (4, 2, 8)]
    ]
    for case in cases:
        assert abs(case["mean_context"] - case["context"]) <= 1
        assert all(case[name] > 0 for name in ("step_ms", "cpu_ms", "plan_ms", "launch_ms"))


def test_the_ideal_engine_reads_the_measured_products(tiny: Path) -> None:
    options = ("--rows", "4", "64", "--rounds", "3", "--device", "cpu", "--dtype", "fp32")
    times = run("products", tiny, *options, common=())["metrics"][tiny.name]
    products = products_of(times)
    doubled_ms = 2 * times["body_ms"]["64"] + times["head_ms"]["4"]
    assert products.ms(128, 4) == pytest.approx(doubled_ms)


def test_products_may_be_measured_apart(tiny: Path) -> None:
    options = ("--split", "--rows", "4", "--rounds", "3", "--device", "cpu", "--dtype", "fp32")
    times = run("products", tiny, *options, common=())["metrics"][tiny.name]
    parts = ["qkv_ms", "o_ms", "gate_up_ms", "down_ms"]
    assert times.keys() == {"body_ms", "head_ms", *parts}
    assert all(times[part]["4"] > 0 for part in parts)


def test_adapters_are_copied_into_consecutive_and_scattered_pages(tiny: Path) -> None:
    options = ("--ranks", "4", "--gib", "0.001", "--pool-gib", "0.01", "--rounds", "2")
    result = run("copies", tiny, *options, "--device", "cpu", "--dtype", "fp32", common=())
    loads = result["metrics"]["loads"]
    assert {load["places"] for load in loads} >= {"consecutive", "scattered"}
    assert all(load["gb_per_s"]["min"] > 0 for load in loads)


def test_cold_and_resident_adapters_take_turns_beside_streams(tiny: Path) -> None:
    streams = ("--streams", "3", "--stream-adapters", "2", "--context", "300", "--seconds", "1")
    beside = ("--block", "0.5", "--interval", "0.2", "--output-tokens", "4")
    metrics = run("cold", tiny, *streams, *beside)["metrics"]
    assert metrics["cold"]["requests"] >= 2
    assert metrics["resident"]["requests"] >= 2
    for name in ("cold", "resident"):
        assert 0 < metrics[name]["token_gap_s"]["p50"] <= metrics[name]["token_gap_s"]["max"]
        assert metrics[name]["first_token_s"]["p50"] > 0
