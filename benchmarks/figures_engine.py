"""What README tells of traces through the engine."""

import itertools
from collections.abc import Iterator

from benchmarks.card import find_card
from benchmarks.figures_text import Result, command
from benchmarks.roofline import GIB, ideal_model, ideal_seconds
from lorry.client.bench.trace import TraceSpec, make_trace

OFFLINE = (
    "Offline throughput of the engine on one GPU: all requests of a trace submitted at once, "
    "median and spread of the runs; *ideal* is the yardstick of `benchmarks/roofline.py`."
)


def engine_figures(rows: list[Result]) -> Iterator[str]:
    """A table of each card's offline runs, then the runs at arrival times."""
    offline = sorted((row for row in rows if not _rate(row)), key=_order)
    if offline:
        yield OFFLINE
        yield ""
    for _, of_card in itertools.groupby(offline, key=lambda row: row["device"]):
        yield from _table(list(of_card))
    for row in sorted((row for row in rows if _rate(row)), key=_order):
        yield from _at_arrivals(row)


def _table(rows: list[Result]) -> Iterator[str]:
    yield "| model | adapters | ranks | popularity | req/s | runs | ideal req/s | output tokens/s |"
    yield "|---|---:|---|---|---:|---|---:|---:|"
    for row in rows:
        metrics, runs = row["metrics"], row["metrics"]["req_per_s_of_runs"]
        ideal = ideal_req_per_s(row)
        yield (
            f"| {' | '.join(_workload(row))} | {metrics['req_per_s']:.1f} "
            f"| {min(runs):.1f} to {max(runs):.1f} | {'-' if ideal is None else f'{ideal:.1f}'} "
            f"| {metrics['out_tok_per_s']:,.0f} |"
        )
    yield ""
    yield f"{rows[0]['device']}; by"
    yield ""
    yield from (
        f"- {line}" for line in dict.fromkeys(f"{command(r)}, {r['date'][:10]}" for r in rows)
    )
    yield ""


def ideal_req_per_s(row: Result) -> float | None:
    """Of the row's trace by the yardstick as it is now, which later measurements refine."""
    config, card = row["config"], find_card(row["device"])
    model = ideal_model(card, config["model"])
    if card is None or model is None:
        return None
    spec = TraceSpec(
        requests=config["requests"],
        adapters=config["adapters"],
        alpha=config["alpha"],
        seed=config["trace_seed"],
    )
    trace = make_trace(spec)
    pool_bytes = config["pool_gib"] * GIB
    return len(trace) / ideal_seconds(card, model, trace, config["ranks"], pool_bytes=pool_bytes)


def _at_arrivals(row: Result) -> Iterator[str]:
    config, metrics = row["config"], row["metrics"]
    ttft_s, gap_s = metrics["ttft_s"], metrics["token_gap_s"]
    model, adapters, ranks, popularity = _workload(row)
    yield (
        f"- {model}, {adapters} adapters, ranks {ranks}, {popularity}, {_rate(row):g} requests/s "
        f"(cv {config['cv']:g}):"
    )
    yield (
        f"  first token {ttft_s['p50'] * 1e3:.0f} ms (p50), {ttft_s['p99'] * 1e3:.0f} ms (p99); "
        f"token gap {gap_s['p50'] * 1e3:.1f} ms, {gap_s['p99'] * 1e3:.1f} ms."
    )
    yield f"  {command(row)}, {row['device']}, {row['date'][:10]}."


def _workload(row: Result) -> tuple[str, str, str, str]:
    config = row["config"]
    if config["adapters"] == 0:
        return config["model"], "none", "-", "-"
    ranks = ", ".join(map(str, config["ranks"]))
    popularity = "uniform" if config["alpha"] == 0 else f"Zipf {config['alpha']:g}"
    return config["model"], str(config["adapters"]), ranks, popularity


def _rate(row: Result) -> float | None:
    """Requests a second; None where all were submitted at once."""
    rate: float | None = row["config"].get("rate")
    return rate


def _order(row: Result) -> tuple[str, str, int, int]:
    config = row["config"]
    return row["device"], config["model"], config["adapters"], max(config["ranks"])
