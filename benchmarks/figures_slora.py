"""What docs/scheduling.md tells of S-LoRA's study: tables and a plot."""

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

# Of schedulers, in other studies too.
COLOURS = {"fcfs": "#8d99ae", "lcfs": "#e9a23b", "abort": "#c8453b", "lorry": "#2a9d8f"}
NAMES = {
    "fcfs": "FCFS",
    "lcfs": "LCFS",
    "abort": "early abort",
    "own-loop": "S-LoRA's loop",
    "slora": "S-LoRA's rule",
    "lorry": "Lorry",
    "clairvoyant": "with hindsight",
    "bound": "any, at most",
}


def slora_text(metrics: dict[str, Any]) -> Iterator[str]:
    """Lines of markdown."""
    yield "| policy | cv | attainment recorded | simulated | satisfaction recorded | simulated |"
    yield "|---|---:|---:|---:|---:|---:|"
    for cell in metrics["recorded"]:
        recorded, simulated = cell["recorded"], cell["simulated"]
        columns = []
        for name in ("attainment", "satisfaction"):
            columns += [_number(recorded.get(name)), _number(simulated[name])]
        yield f"| {NAMES[cell['policy']]} | {cell['cv']:g} | {' | '.join(columns)} |"
    yield ""
    names = list(metrics["compared"][0]["means"])
    yield f"| cv | {' | '.join(NAMES[name] for name in names)} |"
    yield f"|---:|{'---:|' * len(names)}"
    for cell in metrics["compared"]:
        means = [cell["means"][name] for name in names]
        columns = [
            f"{mean['attainment']:.3f} / {_number(mean.get('satisfaction'))}" for mean in means
        ]
        yield f"| {cell['cv']:g} | {' | '.join(columns)} |"
    yield ""
    preempted = [f"{100 * cell['preempted']:.1f}" for cell in metrics["compared"]]
    yield (
        "Means of attainment / satisfaction over the seeds, and what any schedule reaches at most "
        f"that preempts nobody: Lorry's worker preempts, by cv, {', '.join(preempted)} % of the "
        "requests. Lorry minus the other, mean of paired seeds and 95 % interval:"
    )
    yield ""
    yield "| minus | cv | attainment | satisfaction | goodput, req/s |"
    yield "|---|---:|---:|---:|---:|"
    for cell in metrics["compared"]:
        for other, differences in cell["differences"].items():
            columns = [
                _interval(differences[metric]) if metric in differences else "-"
                for metric in ("attainment", "satisfaction", "goodput_req_per_s")
            ]
            yield f"| {NAMES[other]} | {cell['cv']:g} | {' | '.join(columns)} |"


def slora_plot(figure: Figure, metrics: dict[str, Any]) -> None:
    """The recorded runs beside the simulated ones, and what Lorry gains."""
    left, right = figure.subplots(1, 2)
    for policy in ("fcfs", "lcfs", "abort"):
        cells = [cell for cell in metrics["recorded"] if cell["policy"] == policy]
        cvs = [cell["cv"] for cell in cells]
        colour, name = COLOURS[policy], NAMES[policy]
        recorded = [cell["recorded"]["attainment"] for cell in cells]
        simulated = [cell["simulated"]["attainment"] for cell in cells]
        left.plot(cvs, recorded, "o", color=colour, label=f"{name}, recorded")
        left.plot(cvs, simulated, "-", color=colour, label="simulated")
    left.set(xlabel="cv of the gaps between arrivals", ylabel="attainment", ylim=(0, 1))
    left.legend(frameon=False, fontsize=7, ncols=3)
    for other, style in (("own-loop", "-o"), ("slora", "--s")):
        cvs = [cell["cv"] for cell in metrics["compared"]]
        found = [cell["differences"][other]["attainment"] for cell in metrics["compared"]]
        means = [difference["mean"] for difference in found]
        errors = [
            [difference["mean"] - difference["low"] for difference in found],
            [difference["high"] - difference["mean"] for difference in found],
        ]
        right.errorbar(cvs, means, yerr=errors, fmt=style, capsize=3, label=f"to {NAMES[other]}")
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="cv of the gaps between arrivals", ylabel="gain of attainment")
    right.legend(frameon=False, fontsize=8)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
