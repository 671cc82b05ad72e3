"""What docs/scheduling.md tells of the study of clustering: its tables and its plot."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure


def clustering_text(metrics: dict[str, Any]) -> Iterator[str]:
    told = {
        "patient": "No request has an objective:",
        "all passed over": (
            "All have an objective of 6 s, and are passed over for the limit nevertheless:"
        ),
    }
    names = {
        "req_per_s": "requests/s",
        "mean_ttft_s": "mean TTFT, s",
        "p99_ttft_s": "TTFT p99, s",
        "attainment": "attainment",
        "satisfaction": "satisfaction",
    }
    for kind, title in told.items():
        cells = [cell for cell in metrics["cells"] if cell["kind"] == kind]
        columns = [name for name in names if name in cells[0]]
        yield from [title, "", f"| alpha | d | {' | '.join(names[name] for name in columns)} |"]
        yield "|---:|---:" + "|---:" * len(columns) + "|"
        for (alpha, values), alike in groupby(cells, partial(_values, columns)):
            limits = ", ".join(str(cell["limit"] or "none") for cell in alike)
            yield f"| {alpha:g} | {limits} | {values} |"
        yield ""
    yield (
        "In brackets: minus Lorry's defaults over the same traces, which pass over those without "
        "an objective only, from 8 adapters on; mean and 95 % interval."
    )


def clustering_plot(figure: Figure, metrics: dict[str, Any]) -> None:
    shown = (
        ("patient", "req_per_s", "d, no request has an objective", "requests/s"),
        ("all passed over", "attainment", "d, all have one", "attainment"),
        ("all passed over", "satisfaction", "d, all have one", "satisfaction"),
    )
    for axes, (kind, metric, x, y) in zip(figure.subplots(1, 3), shown, strict=True):
        of_kind = [cell for cell in metrics["cells"] if cell["kind"] == kind]
        for alpha in sorted({cell["alpha"] for cell in of_kind}):
            cells = [cell for cell in of_kind if cell["alpha"] == alpha]
            limits = [str(cell["limit"] or "none") for cell in cells]
            values = [cell[metric]["value"] for cell in cells]
            axes.plot(limits, values, "-o", label=f"alpha {alpha:g}")
        axes.set(xlabel=x, ylabel=y)
        axes.legend(frameon=False, fontsize=8)


def _values(columns: Sequence[str], cell: dict[str, Any]) -> tuple[float, str]:
    return cell["alpha"], " | ".join(_beside_default(cell[name]) for name in columns)


def _beside_default(found: dict[str, float]) -> str:
    value, mean, low, high = (found[name] for name in ("value", "mean", "low", "high"))
    if low == high == 0:
        return f"{value:.3f} (the same)"
    return f"{value:.3f} ({mean:+.3f}: {low:+.3f} to {high:+.3f})"
