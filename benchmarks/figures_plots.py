"""Plots of the engine's results; one whose results are missing is not made."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures_engine import ideal_req_per_s
from benchmarks.figures_ranks import rank_panels
from benchmarks.figures_text import Result
from benchmarks.recorded import VLLM, vllm_runs

DOCS = Path(__file__).parents[1] / "docs"
OURS, IDEAL, VLLM_COLOUR, OTHER = "#2a9d8f", "#264653", "#e9a23b", "#c8453b"
USES = {"kv": OURS, "prefix": "#8ab17d", "adapter": VLLM_COLOUR, "free": "#e5e5e5"}
Drawing = Callable[[Axes], None]


def drawings(results: Callable[[str], list[Result]]) -> dict[str, list[tuple[str, Drawing]]]:
    """By file name: the panels of each plot, with their titles, that `results` are enough for."""
    engine = [row for row in results("engine") if row["config"].get("rate") is None]
    found = {
        "throughput.png": list(_throughput(engine, results("baselines.peft"))),
        "rank-mix.png": list(_rank_mixes(engine)),
        "step-floor.png": list(_steps(row for row in results("step") if _has_ideal(row))),
        "memory-split.png": [
            (f"{_title(row)}, {row['config']['adapters']} adapters", _memory(row))
            for row in engine
            if "pool_pages" in row["metrics"] and row["config"]["adapters"] > 1
        ][-3:],
        "tensor-parallel.png": [
            (title, _bars(bars)) for title, bars in rank_panels(results("tensor_parallel"))
        ],
        "ablation.png": [
            (_title(row, f"{row['config']['requests']} requests"), _ablation(row))
            for row in results("ablation")
        ],
    }
    return {name: panels for name, panels in found.items() if panels}


def draw_plots(
    results: Callable[[str], list[Result]], directory: Path = DOCS / "figures"
) -> list[str]:
    """Write the plots; returns their names."""
    directory.mkdir(parents=True, exist_ok=True)
    plots = drawings(results)
    for name, panels in plots.items():
        _figure(panels).savefig(directory / name, dpi=110, metadata={"Software": None})
    return list(plots)


def _figure(panels: Sequence[tuple[str, Drawing]]) -> Figure:
    """A row of up to three panels, or rows of two, as high as the names at their sides need."""
    columns = len(panels) if len(panels) <= 3 else 2
    rows = math.ceil(len(panels) / columns)
    figure = Figure(layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, draw) in zip(places, panels, strict=False):
        draw(axes)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    height = max(3.4, 0.18 * max(len(axes.get_yticks()) for axes in figure.axes))
    figure.set_size_inches(min(13.0, 2.0 + 4.6 * columns), 0.4 + height * rows)
    return figure


def _title(row: Result, what: str = "") -> str:
    config = row["config"]
    ranks = "/".join(map(str, config["ranks"]))
    parts = (f"{config['model']}, rank {ranks}", what, row["device"])
    return ", ".join(part for part in parts if part)


def _throughput(engine: Iterable[Result], peft: Iterable[Result]) -> Iterator[tuple[str, Drawing]]:
    """A panel of each card, model and set of ranks with runs of several numbers of adapters."""

    def panel_of(row: Result) -> tuple[str, str, list[int]]:
        return row["device"], row["config"]["model"], row["config"]["ranks"]

    zipf = sorted((row for row in engine if row["config"]["alpha"] == 1), key=panel_of)
    for panel, rows in itertools.groupby(zipf, key=panel_of):
        of_panel = sorted(rows, key=_num_adapters)
        if len(of_panel) > 1:
            beside = [row for row in peft if panel_of(row) == panel]
            yield _title(of_panel[0]), _by_adapters(of_panel, beside)


def _by_adapters(rows: Sequence[Result], peft: Sequence[Result]) -> Drawing:
    def draw(axes: Axes) -> None:
        adapters = [_num_adapters(row) for row in rows]
        if all(ideals := [ideal_req_per_s(row) for row in rows]):
            axes.plot(adapters, [ideal or 0 for ideal in ideals], ":", color=IDEAL, label="ideal")
        _with_spread(axes, adapters, rows)
        config = rows[0]["config"]
        runs = vllm_runs(rows[0]["device"], config["model"], config["ranks"])
        for (setting, of), marker in zip(runs.items(), "s^vD", strict=False):
            places, rates = [run.adapters for run in of], [run.req_per_s for run in of]
            label = f"{VLLM}, {setting}"
            axes.plot(places, rates, f"{marker}--", color=VLLM_COLOUR, label=label)
        for row in peft:
            for mode, metrics in row["metrics"].items():
                label = f"transformers + peft, {mode.replace('_', ' ')}"
                axes.plot([_num_adapters(row)], [metrics["req_per_s"]], "x", label=label)
        axes.set_xscale("symlog", linthresh=1)
        places = sorted({0, 1, *adapters})
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set(xlabel="adapters (Zipf)", ylabel="requests/s", ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)

    return draw


def _with_spread(axes: Axes, places: Sequence[int], rows: Sequence[Result]) -> None:
    """Our runs: median, and range as a bar."""
    rates = [row["metrics"]["req_per_s"] for row in rows]
    runs = [row["metrics"]["req_per_s_of_runs"] for row in rows]
    below = [rate - min(of) for rate, of in zip(rates, runs, strict=True)]
    above = [max(of) - rate for rate, of in zip(rates, runs, strict=True)]
    axes.errorbar(places, rates, [below, above], fmt="o-", color=OURS, capsize=3, label="Lorry")


def _rank_mixes(engine: Iterable[Result]) -> Iterator[tuple[str, Drawing]]:
    """A panel of each card, model and number of adapters with runs of several sets of ranks."""

    def panel_of(row: Result) -> tuple[str, str, int, float]:
        config = row["config"]
        return row["device"], config["model"], config["adapters"], config["alpha"]

    with_adapters = sorted((row for row in engine if _num_adapters(row)), key=panel_of)
    for (device, model, adapters, _), rows in itertools.groupby(with_adapters, key=panel_of):
        of_panel = sorted(rows, key=lambda row: sum(row["config"]["ranks"]))
        if len(of_panel) > 1:
            yield f"{model}, {adapters} adapters, {device}", _by_ranks(of_panel)


def _by_ranks(rows: Sequence[Result]) -> Drawing:
    def draw(axes: Axes) -> None:
        names = ["/".join(map(str, row["config"]["ranks"])) for row in rows]
        ideals = [ideal_req_per_s(row) or 0.0 for row in rows]
        axes.bar(names, ideals, color="white", edgecolor=IDEAL, linestyle=":", label="ideal")
        rates = [row["metrics"]["req_per_s"] for row in rows]
        axes.bar(names, rates, color=OURS, width=0.6, label="Lorry")
        axes.set(xlabel="ranks", ylabel="requests/s")
        axes.legend(frameon=False, fontsize=8)

    return draw


def _has_ideal(row: Result) -> bool:
    return all("ideal_ms" in case for case in row["metrics"]["cases"])


def _steps(rows: Iterable[Result]) -> Iterator[tuple[str, Drawing]]:
    """A panel of each card and model."""

    def panel_of(row: Result) -> tuple[str, str]:
        return row["device"], row["config"]["model"]

    for (device, model), of in itertools.groupby(sorted(rows, key=panel_of), key=panel_of):
        cases = [case for row in of for case in row["metrics"]["cases"]]
        yield f"{model}, decode step, {device}", _beside_floors(cases)


def _beside_floors(cases: Sequence[dict[str, Any]]) -> Drawing:
    def draw(axes: Axes) -> None:
        names = [f"{c['batch']}/{c['context']}/{c['adapters']}/{c['rank']}" for c in cases]
        axes.barh(names, [case["step_ms"] for case in cases], color=OURS, label="step")
        floors = [case["ideal_ms"] for case in cases]
        axes.barh(names, floors, color=IDEAL, height=0.4, label="floor")
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set(xlabel="ms", ylabel="batch/context/adapters/rank")
        axes.legend(frameon=False, fontsize=8)

    return draw


def _memory(row: Result) -> Drawing:
    def draw(axes: Axes) -> None:
        split = row["metrics"]["pool_pages"]
        total = sum(split[use][0] for use in USES)
        page_gib = row["config"]["pool_gib"] / total
        layers = [[pages * page_gib for pages in split[use]] for use in USES]
        axes.stackplot(split["time_s"], layers, labels=list(USES), colors=list(USES.values()))
        axes.set(xlabel="s", ylabel="GiB of the pool")
        axes.legend(frameon=False, fontsize=8, loc="lower center", ncols=len(USES))

    return draw


def _bars(bars: Sequence[tuple[str, float]]) -> Drawing:
    def draw(axes: Axes) -> None:
        names, rates = zip(*bars, strict=True)
        colours = [IDEAL if name.endswith("base only") else OURS for name in names]
        axes.barh(names, rates, color=colours)
        axes.invert_yaxis()
        axes.set(xlabel="requests/s", ylabel="GPUs, LoRA")

    return draw


def _ablation(row: Result) -> Drawing:
    def draw(axes: Axes) -> None:
        names = list(row["metrics"])
        rates = [of["req_per_s"] for of in row["metrics"].values()]
        colours = [OURS, *[OTHER] * (len(names) - 1)]
        axes.barh(names, rates, color=colours)
        axes.invert_yaxis()
        axes.set(xlabel="requests/s")

    return draw


def _num_adapters(row: Result) -> int:
    adapters: int = row["config"]["adapters"]
    return adapters
