import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import (
    BEGIN,
    END,
    MEASUREMENTS,
    PERFORMANCE,
    RANKS,
    README,
    REPRODUCTION,
    SCHEDULING,
    figures,
    measurements_text,
    results,
    studies,
)
from benchmarks.figures_engine import engine_figures, vllm_req_per_s
from benchmarks.figures_performance import performance_text
from benchmarks.figures_plots import DOCS, draw_plots, drawings
from benchmarks.figures_ranks import ranks_text
from benchmarks.figures_reproduction import NOTHING, reproduction_text
from benchmarks.figures_scheduling import scheduling_text
from benchmarks.recorded import DEVICE

PLAIN = {"requests": 50, "trace_seed": 42, "alpha": 1.0, "pool_gib": 108.0}


def test_readme_holds_what_the_result_files_say() -> None:
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == figures()


def test_the_page_of_measurements_holds_what_the_result_files_say() -> None:
    text = MEASUREMENTS.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == measurements_text()


def test_the_page_of_scheduling_holds_what_the_studies_say() -> None:
    text = SCHEDULING.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == scheduling_text(studies())
    for plot in re.findall(r"\(figures/(\S+)\)", text):
        assert (SCHEDULING.parent / "figures" / plot).is_file()


def test_the_page_of_performance_holds_what_the_results_say() -> None:
    text = PERFORMANCE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == performance_text(results)


def test_the_page_of_the_reproduction_holds_what_the_results_say() -> None:
    text = REPRODUCTION.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == reproduction_text(results)


def test_the_page_of_several_gpus_holds_what_the_results_say() -> None:
    text = RANKS.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == ranks_text(results)


def rank_result(size: int, lora: str | None, rate: float, **config: bool) -> dict[str, Any]:
    """Of steps at two batches, of which the larger has no room for adapters, and two traces."""
    step = {"batch": 16, "mean_context": 512, "step_ms": 7.0}
    without_room = {"batch": 64, "mean_context": 512, "adapters": 0, "step_ms": 8.0}
    return {
        "device": "a GPU",
        "date": "2026-01-02",
        "command": "it",
        "config": {
            "model": "llama-2-13b",
            "tensor_parallel": size,
            "lora": lora,
            "ranks": [8, 16],
            "adapters": 200,
            "context": 512,
            "requests": 20,
            "trace_seed": 42,
            "one_shot_sums": True,
        }
        | config,
        "metrics": {
            "pool_gib": 100.0,
            "steps": [step | {"adapters": 0}, step | {"adapters": 16}, without_room],
            "traces": [{"adapters": 0, "req_per_s": 20.0}, {"adapters": 200, "req_per_s": rate}],
            "launches": [{"batch": 16, "adapters": 16, "collectives_ms": 1.25}],
        },
    }


def test_ranks_are_told_by_model_and_strategy(tmp_path: Path) -> None:
    ranks = [
        rank_result(2, "slora", 17.0),
        rank_result(1, None, 9.0),
        rank_result(2, "silent", 20.0),
        rank_result(2, "replicated", 19.0),
        rank_result(2, "replicated", 20.0, one_shot_sums=False),
    ]
    sums = {"nccl_us": {"4096": 9.0, "8192": 10.0}, "one_shot_us": {"4096": 5.0}}
    collectives = ranks[0] | {"metrics": {"sums": sums, "products": {}}}
    found = {"tensor_parallel": ranks, "collectives": [collectives]}
    text = ranks_text(lambda benchmark: found.get(benchmark, []))
    assert "| 2 | replicated | 16 | 7.00 | - | 7.00 | - | 1.25 |" in text
    assert "| 2 | replicated | 64 | 8.00 | - | - | - | - |" in text
    assert "| 2 | replicated, sums by NCCL | 16 | 7.00 |" in text
    assert "| 2 | replicated | 20.00 | - | 19.00 | - | -5.0% |" in text
    assert "| 1 | one GPU | 20.00 | - | 9.00 | - | - |" in text
    assert "| 8,192 | 10.00 | - |" in text
    assert "projected" not in text
    assert text.index("| 1 | one GPU") < text.index("| 2 | replicated") < text.index("| 2 | S-LoRA")
    plots = draw_plots(lambda benchmark: found.get(benchmark, []), tmp_path)
    assert plots == ["tensor-parallel.png"]


def test_more_gpus_are_projected_at_the_share_of_the_ideal_that_was_measured() -> None:
    products = {"llama-2-13b": {"body_ms": {"64": 0.1}, "head_ms": {"64": 0.01}}}
    metrics = {
        "copy_bytes_per_s": 4e12,
        "sums": {"nccl_us": {"4096": 5.0, "100000000": 5.0}},
        "products": {"2": products, "4": products},
    }
    collectives = rank_result(2, "replicated", 1.0) | {"metrics": metrics}
    ranks = [rank_result(2, "replicated", 6.25)]
    found = {"tensor_parallel": ranks, "collectives": [collectives]}
    text = ranks_text(lambda benchmark: found.get(benchmark, []))
    (measured,) = re.findall(r"\| 2 \| replicated \| \S+ \| \S+ \| 6.25 \| (\d+)% \|", text)
    (row,) = re.findall(r"\| llama-2-13b \| 4 \| \S+ \| \S+ \| 200 \| (\S+) \| (\S+) \|", text)
    ideal, projected = map(float, row)
    assert 0 < float(measured) < 100
    assert projected / ideal == pytest.approx(float(measured) / 100, abs=0.01)


def test_the_ideal_of_several_gpus_is_by_the_sums_of_as_many() -> None:
    products = {"llama-2-13b": {"body_ms": {"64": 0.1}, "head_ms": {"64": 0.01}}}

    def collectives(size: int, sum_us: float | None) -> dict[str, Any]:
        sums = {} if sum_us is None else {"nccl_us": {"4096": sum_us, "100000000": sum_us}}
        metrics = {"copy_bytes_per_s": 4e12, "sums": sums, "products": {"4": products}}
        return rank_result(size, "replicated", 1.0) | {"metrics": metrics}

    def ideals(*measured: dict[str, Any]) -> list[str]:
        found = {
            "tensor_parallel": [rank_result(4, "replicated", 1.0)],
            "collectives": list(measured),
        }
        text = ranks_text(lambda benchmark: found.get(benchmark, []))
        return re.findall(r"\| 4 \| replicated \| 16 \| 7.00 \| (\S+) \| 7.00 \| (\S+) \|", text)

    alone, two, four = collectives(1, None), collectives(2, 5.0), collectives(4, 50.0)
    assert ideals(alone, two, four) == ideals(four) != ideals(two)


def test_what_one_kernel_computes_is_one_part_where_it_was_measured() -> None:
    kernels = results("kernels")[0]
    kernels["metrics"].pop("fused", None)
    assert "| expand of q, k, v | " in performance_text(lambda b: [kernels] * (b == "kernels"))
    one, name = {"us": 8.0, "floor_us": 3.0}, "B64 n64 r16 expand + RoPE, one kernel"
    kernels["metrics"]["fused"] = {f"{size} {name}": one for size in ("7B", "8B")}
    text = performance_text(lambda b: [kernels] * (b == "kernels"))
    assert text.count("| expand of q, k, v, RoPE and writing KV | 0.26 | 0.10 | 2.67 |") == 2
    assert "| expand of q, k, v | " not in text
    assert "| RoPE and writing KV | " not in text


def test_steps_with_and_without_fusion_are_told_with_the_spread_of_runs() -> None:
    case: dict[str, Any] = {"batch": 64, "adapters": 8, "rank": 16}
    case |= {"step_ms": 7.0, "unfused_step_ms": 7.08}
    case |= {"saved_us": 80.4, "saved_us_of_runs": [75.0, 80.4, 90.0]}
    fused: dict[str, Any] = {"device": "a GPU", "date": "2026-01-02", "command": "it"}
    fused |= {"config": {"model": "llama-3-8b", "context": 512}, "metrics": {"cases": [case]}}
    text = performance_text(lambda benchmark: [fused] if benchmark == "fused" else [])
    assert "| 64 | 8 | 16 | 7.00 | 7.08 | 80 (75 to 90) |" in text


def test_settings_and_baselines_are_told_as_far_as_they_are_measured() -> None:
    assert reproduction_text(lambda _: []).count(NOTHING) == 2
    some, mean = {"median": 9.0, "min": 8.0, "max": 10.0}, {"mean": 1.5}
    source = {"device": "a GPU", "date": "2026-01-02", "command": "it"}
    model = {"model": "llama-2-7b", "ranks": [8], "adapters": 200, "batch": 32}
    cell: dict[str, Any] = {"adapters": 200, "rate": 24, "cv": 1.0, "alpha": 0.1, "req_per_s": 20.0}
    cell |= {"attainment": 0.75, "latency_s": mean, "ttft_s": mean}
    cell |= {"adapter_loads": 3, "adapter_evictions": 2}
    paper = {"setting": "s2", "pool_gib": 108.0, "cell_seconds": 20.0}
    packed = {"does_not_fit": "the GPU is full"}
    one = {"req_per_s": some, "pool_gib_of_each": 108.0}
    peft = {"req_per_s": 0.1, "out_tok_per_s": 43.0, "requests": 12, "seconds": 120.0}
    metrics: dict[str, dict[str, Any]] = {
        "reproduction": {"cells": [cell]},
        "baselines.merged": {
            "cases": [
                {"adapters": 5, "merged_req_per_s": some, "on_the_fly_req_per_s": some}
                | {"merging_s": some}
            ]
        },
        "baselines.packed": {"cases": [{"copies": 5, "packed": packed, "on_the_fly": one}]},
        "baselines.peft": {"mixed": peft},
    }
    text = reproduction_text(
        lambda benchmark: [source | {"config": model | paper, "metrics": metrics[benchmark]}]
    )
    assert NOTHING not in text
    assert "| 200 | 24 | 1 | 0.1 | 20.00 | - | 1.50 | 1.50 | 0.750 | 3 | 2 |" in text
    assert "| 5 | do not fit | - | 9.0 (8.0 to 10.0) | 108.0 |" in text
    assert "| mixed | 0.100 | 43 | 12 | 120 |" in text


def test_every_plot_that_results_are_enough_for_is_committed() -> None:
    assert all((DOCS / "figures" / name).is_file() for name in drawings(results))


def test_no_plot_is_made_without_results(tmp_path: Path) -> None:
    assert draw_plots(lambda _: [], tmp_path) == []


def test_each_kind_of_result_has_its_plot(tmp_path: Path) -> None:
    split = {"time_s": [0.0, 1.0], "kv": [0, 4], "prefix": [0, 0], "adapter": [1, 2]}
    rows = [
        engine_result("llama-3-8b", adapters, "it", ranks=ranks)
        for adapters, ranks in ((0, [16]), (200, [16]), (200, [8, 64]))
    ]
    rows[1]["metrics"]["pool_pages"] = split | {"free": [9, 4]}
    case = {"batch": 64, "context": 1024, "adapters": 64, "rank": 16, "step_ms": 7, "ideal_ms": 6}
    config = {"model": "llama-3-8b", "ranks": [16], "adapters": 200, "requests": 500}
    found: dict[str, list[dict[str, Any]]] = {
        "engine": rows,
        "step": [{"device": "a GPU", "config": config, "metrics": {"cases": [case]}}],
        "ablation": [
            {"device": "a GPU", "config": config, "metrics": {"whole engine": {"req_per_s": 9.0}}}
        ],
        "baselines.peft": [
            {"device": "a GPU", "config": config, "metrics": {"mixed": {"req_per_s": 0.1}}}
        ],
    }
    names = draw_plots(lambda benchmark: found.get(benchmark, []), tmp_path)
    kinds = ("throughput", "rank-mix", "step-floor", "memory-split", "ablation")
    assert set(names) == {f"{kind}.png" for kind in kinds}
    assert set(names) == {path.name for path in tmp_path.iterdir()}


def engine_result(model: str, adapters: int, command: str, **config: Any) -> dict[str, Any]:
    seconds = {"p50": 0.5, "p99": 0.75}
    return {
        "device": "a GPU",
        "date": "2026-01-02T03:04:05+00:00",
        "command": command,
        "config": PLAIN
        | {"model": model, "adapters": adapters, "ranks": [8], "rate": None}
        | config,
        "metrics": {
            "req_per_s": 20.0,
            "req_per_s_of_runs": [20.0, 19.0, 22.0],
            "out_tok_per_s": 5000.0,
            "ttft_s": seconds,
            "token_gap_s": seconds,
        },
    }


def test_traces_are_told_by_model_and_adapters_with_the_commands_that_ran_them() -> None:
    both = "python -m benchmarks.engine --adapters 0 9 --directory /tmp/a --commit 123"
    lines = list(
        engine_figures(
            [
                engine_result("llama-3-8b", 9, both),
                engine_result("llama-2-7b", 9, "other", alpha=0.0, ranks=[8, 64]),
                engine_result("llama-3-8b", 0, both),
            ]
        )
    )
    rows = [line.split(" | ") for line in lines if line.startswith("| llama")]
    assert [row[:6] for row in rows] == [
        ["| llama-2-7b", "9", "8, 64", "uniform", "-", "**20.0**"],
        ["| llama-3-8b", "none", "-", "-", "-", "**20.0**"],
        ["| llama-3-8b", "9", "8", "Zipf 1", "-", "**20.0**"],
    ]
    assert {row[6] for row in rows} == {"19.0 to 22.0"}
    assert [line for line in lines if line.startswith("- ")] == [
        "- `other`, 2026-01-02",
        "- `python -m benchmarks.engine --adapters 0 9`, 2026-01-02",
    ]


@pytest.mark.parametrize(
    ("adapters", "changes", "recorded"),
    [
        (200, {"ranks": [8]}, 19.12),  # the best of three settings
        (0, {"ranks": [8]}, 30.74),
        (200, {"ranks": [8], "alpha": 0.0}, None),
        (9, {"ranks": [8]}, None),
    ],
)
def test_only_the_same_trace_is_held_against_what_was_recorded(
    adapters: int, changes: dict[str, Any], recorded: float | None
) -> None:
    row = engine_result("llama-2-7b", adapters, "it", **changes)
    assert vllm_req_per_s(row | {"device": DEVICE}) == recorded
    assert vllm_req_per_s(row) is None


def test_runs_at_arrivals_tell_latencies_apart_from_the_table() -> None:
    lines = list(engine_figures([engine_result("llama-3-8b", 9, "it", rate=4.0, cv=1.0)]))
    assert not any(line.startswith("|") for line in lines)
    assert "4 requests/s" in lines[0]
    assert "first token 500 ms (p50), 750 ms (p99)" in lines[1]
