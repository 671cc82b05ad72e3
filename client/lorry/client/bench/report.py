"""One HTML page that tells a run: self-contained, with its plots inside."""

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from lorry.client.bench.plots import plots
from lorry.client.bench.record import Record

TIMES = {
    "time to first token": "ttft_s",
    "time per output token": "tpot_s",
    "latency": "latency_s",
    "sent late by": "send_delay_s",
}


def report(result: dict[str, Any], records: Sequence[Record]) -> str:
    metrics = result["metrics"]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(
        files("lorry.client.bench").joinpath("report.html.j2").read_text()
    )
    return template.render(
        result=result,
        metrics=metrics,
        facts=facts(metrics),
        times={label: metrics[key] for label, key in TIMES.items() if metrics[key]},
        columns=("mean", "p50", "p90", "p95", "p99"),
        plots=plots(records),
    )


def facts(metrics: dict[str, Any]) -> dict[str, str]:
    """The figures that one looks for first."""
    ttft_s = metrics["ttft_s"] or {"p50": math.nan, "p99": math.nan}
    return {
        "requests served": f"{metrics['served']} of {metrics['requests']}",
        "requests/s": f"{metrics['req_per_s']:.2f}",
        "output tokens/s": f"{metrics['out_tok_per_s']:,.0f}",
        "TTFT p50": f"{ttft_s['p50'] * 1e3:.0f} ms",
        "TTFT p99": f"{ttft_s['p99'] * 1e3:.0f} ms",
        "SLO attainment": f"{metrics['attainment']:.1%}",
        "of admitted requests": f"{metrics['attainment_of_admitted']:.1%}",
        "goodput, requests/s": f"{metrics['goodput_req_per_s']:.2f}",
        "satisfaction": f"{metrics['satisfaction']:.3f}",
    }
