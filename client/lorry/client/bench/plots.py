"""Plots of a run's records, as SVG."""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorry.client.bench.record import Record
from lorry.client.bench.summary import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST

WIDTH_IN, HEIGHT_IN = 9.0, 3.2
TIME_BINS = 60
MET, LATE, FAILED = "#2a9d8f", "#e9a23b", "#c8453b"
LINES = ("#264653", "#c8453b", "#2a9d8f", "#e9a23b", "#7b5ea7", "#8d99ae")


def plots(records: Sequence[Record]) -> dict[str, str]:
    """SVG documents by title."""
    drawn: dict[str, Callable[[Figure, Sequence[Record]], None]] = {
        "Requests a second, by time": _rates,
        "Requests open, by time": _open_requests,
        "Time to first token, by planned arrival": _first_tokens,
        "Distributions": _distributions,
    }
    if len({record.planned.tenant for record in records}) > 1:
        drawn["Service by tenant, by time"] = _service
    return {title: _svg(draw, records) for title, draw in drawn.items()}


def _svg(draw: Callable[[Figure, Sequence[Record]], None], records: Sequence[Record]) -> str:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    draw(figure, records)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    text = io.StringIO()
    figure.savefig(text, format="svg", dpi=150, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _rates(figure: Figure, records: Sequence[Record]) -> None:
    axes, edges = figure.subplots(), _edges(records)
    ended = [r for r in records if r.ended_s is not None]
    series: dict[str, tuple[list[float | None], str]] = {
        "arrived": ([r.planned.arrival_s for r in records], LINES[0]),
        "served": ([r.ended_s for r in ended if r.ok], MET),
        "served within the SLO": ([r.ended_s for r in ended if r.met_slo], LATE),
        "refused or failed": ([r.ended_s for r in ended if not r.ok], FAILED),
    }
    for label, (times_s, colour) in series.items():
        counts, _ = np.histogram([t for t in times_s if t is not None], edges)
        axes.step(edges[:-1], counts / np.diff(edges), where="post", label=label, color=colour)
    axes.set(xlabel="seconds", ylabel="requests/s", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _open_requests(figure: Figure, records: Sequence[Record]) -> None:
    axes = figure.subplots()
    spans = [(r.sent_s, r.ended_s) for r in records if r.sent_s is not None]
    changes = [(start, 1) for start, _ in spans]
    changes += [(end, -1) for _, end in spans if end is not None]
    changes.sort()
    times_s = [time_s for time_s, _ in changes]
    axes.step(times_s, np.cumsum([change for _, change in changes]), where="post", color=LINES[0])
    axes.set(xlabel="seconds", ylabel="open requests", ylim=(0, None))


def _first_tokens(figure: Figure, records: Sequence[Record]) -> None:
    axes = figure.subplots()
    groups = {
        "met the SLO": ([r for r in records if r.met_slo], MET),
        "served, too late": ([r for r in records if r.ok and not r.met_slo], LATE),
        "refused or failed (time to the answer)": ([r for r in records if not r.ok], FAILED),
    }
    for label, (group, colour) in groups.items():
        waits_s = [r.ttft_s if r.ttft_s is not None else r.latency_s for r in group]
        arrivals_s = [r.planned.arrival_s for r in group]
        axes.scatter(arrivals_s, waits_s, s=4, color=colour, label=label, rasterized=True)  # type: ignore[arg-type]
    _mark_slo(axes.axhline, {r.slo.ttft_s for r in records})
    axes.set(xlabel="planned arrival, seconds", ylabel="seconds", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, markerscale=2)


def _distributions(figure: Figure, records: Sequence[Record]) -> None:
    first, per_token, latency = figure.subplots(1, 3, sharey=True)
    _cumulative(first, "time to first token, s", [r.ttft_s for r in records])
    _cumulative(per_token, "time per output token, s", [r.tpot_s for r in records])
    _cumulative(latency, "latency, s", [r.latency_s for r in records if r.ok])
    _mark_slo(first.axvline, {r.slo.ttft_s for r in records})
    _mark_slo(per_token.axvline, {r.slo.tpot_s for r in records})
    first.set_ylabel("share of requests")


def _cumulative(axes: Axes, label: str, values: Sequence[float | None]) -> None:
    found = sorted(value for value in values if value is not None)
    axes.plot(found, np.arange(1, len(found) + 1) / max(1, len(found)), color=LINES[0])
    axes.set(xlabel=label, xlim=(0, None), ylim=(0, 1))


def _service(figure: Figure, records: Sequence[Record]) -> None:
    """Virtual tokens that each tenant has received, counted as its requests end."""
    axes, edges = figure.subplots(), _edges(records)
    tenants = sorted({record.planned.tenant for record in records})
    for number, tenant in enumerate(tenants):
        served = [r for r in records if r.planned.tenant == tenant and r.admitted]
        costs = [
            PROMPT_TOKEN_COST * r.planned.prompt_tokens + OUTPUT_TOKEN_COST * r.output_tokens
            for r in served
        ]
        sums, _ = np.histogram([r.ended_s or 0.0 for r in served], edges, weights=costs)
        axes.plot(edges[1:], np.cumsum(sums), label=tenant, color=LINES[number % len(LINES)])
    axes.set(xlabel="seconds", ylabel="virtual tokens", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _edges(records: Sequence[Record]) -> np.ndarray:
    last_s = max(max(r.planned.arrival_s, r.ended_s or 0.0) for r in records)
    return np.linspace(0.0, max(last_s, 1e-3), TIME_BINS + 1)


def _mark_slo(draw_line: Callable[..., object], slos_s: set[float]) -> None:
    for slo_s in slos_s:
        if math.isfinite(slo_s):
            draw_line(slo_s, color=FAILED, linewidth=1, linestyle="--")
