"""What docs/scheduling.md tells of the policies' studies: tables and plots."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures_clustering import clustering_plot, clustering_text
from benchmarks.figures_slora import COLOURS, NAMES, slora_plot, slora_text
from benchmarks.figures_text import Result

DOCS = Path(__file__).parents[1] / "docs"


def scheduling_text(studies: Sequence[Result]) -> str:
    """The generated section of docs/scheduling.md."""
    lines: list[str] = []
    for study in studies:
        kind = study["benchmark"].removeprefix("studies.")
        lines += ["", f"### {TITLES[kind]}{_of(study)}", ""]
        if kind in PLOTS:
            lines += [f"![{TITLES[kind]}](figures/{_plot_name(study)})", ""]
        lines += TABLES[kind](study["metrics"])
        lines += ["", f"`{study['command']}`, {study['date'][:10]}"]
    return "\n".join(lines) + "\n"


def draw_scheduling(studies: Sequence[Result], directory: Path = DOCS / "figures") -> None:
    """A PNG for each study that has a plot."""
    directory.mkdir(parents=True, exist_ok=True)
    for study in studies:
        kind = study["benchmark"].removeprefix("studies.")
        if kind in PLOTS:
            figure = Figure(figsize=(9, 3.2), layout="constrained")
            PLOTS[kind](figure, study["metrics"])
            for axes in figure.axes:
                axes.spines[["top", "right"]].set_visible(False)
                axes.grid(alpha=0.25)
            figure.savefig(directory / _plot_name(study), dpi=110, metadata={"Software": None})


def _plot_name(study: Result) -> str:
    kind = study["benchmark"].removeprefix("studies.")
    return f"scheduling-{'-'.join([kind, *study['config'].get('hardware', '').split()])}.png"


def _of(study: Result) -> str:
    hardware = study["config"].get("hardware")
    return f" ({hardware})" if hardware else ""


def _load(metrics: dict[str, Any]) -> Iterator[str]:
    yield f"Capacity {metrics['capacity_req_per_s']:.1f} requests/s."
    yield ""
    yield (
        "| load | capacity's share | FCFS attainment | Lorry attainment | of admitted "
        "| Lorry goodput, req/s | longest wait for an abort, s |"
    )
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for cell in metrics["cells"]:
        lorry = cell["lorry"]
        yield (
            f"| {cell['load']:g} | {cell['allowed']:.3f} | {cell['fcfs']['attainment']:.3f} "
            f"| {lorry['attainment']:.3f} | {lorry['attainment_of_admitted']:.3f} "
            f"| {lorry['goodput_while_arriving_per_s']:.1f} | {lorry['longest_abort_s']:.2f} |"
        )


def _load_plot(figure: Figure, metrics: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    cells = metrics["cells"]
    loads = [cell["load"] for cell in cells]
    left.plot(loads, [cell["allowed"] for cell in cells], "k:", label="what capacity allows")
    for name in ("fcfs", "lorry"):
        for axes, metric in ((left, "attainment"), (right, "goodput_while_arriving_per_s")):
            values = [cell[name][metric] for cell in cells]
            axes.plot(loads, values, "-o", color=COLOURS[name], label=NAMES[name])
    _label(left, "load, by capacity", "attainment")
    _label(right, "load, by capacity", "goodput, requests/s")


def _tpot(metrics: dict[str, Any]) -> Iterator[str]:
    yield (
        "| load | all alike: attainment | of served | goodput, req/s | of two kinds: quick ones' "
        "attainment | patient ones' | goodput of both, req/s |"
    )
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for cell in metrics["cells"]:
        both = [cell["alike"][name] for name in ("counted", "kept")]
        kinds = [cell["mixed"][name] for name in ("counted", "kept")]
        columns = [
            _pair([found["attainment"] for found in both], 3),
            _pair([found["attainment_of_served"] for found in both], 3),
            _pair([found["goodput_req_per_s"] for found in both], 1),
            _pair([found["quick"]["attainment"] for found in kinds], 3),
            _pair([found["patient"]["attainment"] for found in kinds], 3),
            _pair([sum(k["goodput_req_per_s"] for k in found.values()) for found in kinds], 1),
        ]
        yield f"| {cell['load']:g} | {' | '.join(columns)} |"
    yield ""
    yield "Objectives only counted / kept."


def _tpot_plot(figure: Figure, metrics: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    cells = metrics["cells"]
    loads = [cell["load"] for cell in cells]
    for name, style in (("counted", "--o"), ("kept", "-o")):
        colour = COLOURS["lorry" if name == "kept" else "fcfs"]
        for axes, metric in ((left, "attainment"), (right, "goodput_req_per_s")):
            values = [cell["alike"][name][metric] for cell in cells]
            axes.plot(loads, values, style, color=colour, label=f"objectives {name}")
    _label(left, "load, by capacity", "attainment")
    _label(right, "load, by capacity", "goodput, requests/s")


def _fairness(metrics: dict[str, Any]) -> Iterator[str]:
    yield (
        "| fairness | modest tenant's TTFT beside load, p50, s | p99 | beside greed, p50, s | p99 "
        "| greedy tenant served, req/s |"
    )
    yield "|---|---:|---:|---:|---:|---:|"
    names = {
        "all": "turns, places and queue kept",
        "places": "turns and places kept",
        "turns": "turns",
        "none": "none",
    }
    for name, found in metrics["greedy"].items():
        times = [
            f"{found[crowd]['ttft_s'][rank]:.3f}"
            for crowd in ("load", "greedy")
            for rank in ("p50", "p99")
        ]
        served = found["greedy"]["other_req_per_s"]
        yield f"| {names[name]} | {' | '.join(times)} | {served:.1f} |"
    lone = metrics["lone_req_per_s"]
    yield ""
    yield (
        f"Alone, the greedy tenant is served {lone['all']:.1f} requests/s, and {lone['turns']:.1f} "
        "if nothing is ever kept."
    )
    ratio = metrics["weighted"]["ratio"]
    yield f"Service of two backlogged tenants of weights 3 and 1: {ratio:.3f} to 1."


def _placement(metrics: dict[str, Any]) -> Iterator[str]:
    yield "| placement | adapter loads | GB loaded | imbalance | TTFT p99, s | requeued | failed |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    names = {"residency": "Lorry's", "random": "random", "one_lost": "Lorry's, one worker lost"}
    for key, name in names.items():
        found = metrics[key]
        yield (
            f"| {name} | {found['loads']} | {found['loaded_bytes'] / 1e9:.1f} "
            f"| {found['imbalance']:.1%} | {found['ttft_s']['p99']:.3f} "
            f"| {found['requeued']} | {found['failed']} |"
        )


def _scale(metrics: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{metrics['requests']:,} requests, {metrics['steps']:,} steps and "
        f"{metrics['events']:,} events of {metrics['virtual_seconds']:.0f} virtual seconds take "
        f"{metrics['cpu_seconds']:.0f} s of CPU time: "
        f"{metrics['cpu_seconds'] / metrics['requests'] * 1e3:.2f} ms a request."
    )


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False, fontsize=8)


def _pair(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


TITLES = {
    "slora": "S-LoRA's study of early abort",
    "load": "Load from half to three times the capacity",
    "tpot": "Objectives for the time per output token",
    "clustering": "Adapters of a batch",
    "fairness": "Fairness",
    "placement": "Placement over eight workers",
    "scale": "The simulator's own speed",
}
TABLES = {
    "slora": slora_text,
    "load": _load,
    "tpot": _tpot,
    "clustering": clustering_text,
    "fairness": _fairness,
    "placement": _placement,
    "scale": _scale,
}
PLOTS = {
    "slora": slora_plot,
    "load": _load_plot,
    "tpot": _tpot_plot,
    "clustering": clustering_plot,
}
