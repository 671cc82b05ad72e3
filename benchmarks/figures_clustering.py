"""What docs/scheduling.md tells of the study of clustering: its tables and its plot."""

from collections.abc import Iterator
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
        for cell in cells:
            values = " | ".join(_beside_default(cell[name]) for name in columns)
            yield f"| {cell['alpha']:g} | {cell['limit'] or 'none'} | {values} |"
        yield ""
    yield (
        "In brackets: minus Lorry's defaults over the same traces, which pass over those without "
        "an objective only, from 8 adapters on; mean and 95 % interval."
    )


def clustering_plot(figure: Figure, metrics: dict[str, Any]) -> None:
    axes_of = dict(zip(("patient", "all passed over"), figure.subplots(1, 2), strict=True))
    metric_of = {"patient": "req_per_s", "all passed over": "attainment"}
    for kind, axes in axes_of.items():
        of_kind = [cell for cell in metrics["cells"] if cell["kind"] == kind]
        for alpha in sorted({cell["alpha"] for cell in of_kind}):
            cells = [cell for cell in of_kind if cell["alpha"] == alpha]
            limits = [str(cell["limit"] or "none") for cell in cells]
            values = [cell[metric_of[kind]]["value"] for cell in cells]
            axes.plot(limits, values, "-o", label=f"alpha {alpha:g}")
    axes_of["patient"].set(xlabel="d, no request has an objective", ylabel="requests/s")
    axes_of["all passed over"].set(xlabel="d, all have one", ylabel="attainment")
    for axes in axes_of.values():
        axes.legend(frameon=False, fontsize=8)


def _beside_default(found: dict[str, float]) -> str:
    return (
        f"{found['value']:.3f} ({found['mean']:+.3f}: {found['low']:+.3f} to {found['high']:+.3f})"
    )
