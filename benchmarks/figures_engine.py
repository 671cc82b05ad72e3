"""What README tells of traces through the engine."""

import itertools
from collections.abc import Iterator

from benchmarks.card import find_card
from benchmarks.figures_text import Result, command
from benchmarks.recorded import RECORDED_ALPHA, VLLM, vllm_runs
from benchmarks.roofline import GIB, ideal_model, ideal_seconds
from lorry.client.bench.trace import TraceSpec, make_trace

OFFLINE = (
    "Offline throughput of the engine on one GPU, requests a second: all requests of a trace "
    f"submitted at once, median of the runs. *{VLLM}* is the best of its runs in the plot, *ideal* "
    "the yardstick of `benchmarks/roofline.py`."
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
    yield f"| model | adapters | ranks | popularity | {VLLM} | Lorry | runs | ideal |"
    yield "|---|---:|---|---|---:|---:|---|---:|"
    for row in rows:
        runs = row["metrics"]["req_per_s_of_runs"]
        yield (
            f"| {' | '.join(_workload(row))} | {_number(vllm_req_per_s(row))} "
            f"| **{row['metrics']['req_per_s']:.1f}** | {min(runs):.1f} to {max(runs):.1f} "
            f"| {_number(ideal_req_per_s(row))} |"
        )
    yield ""
    yield f"{rows[0]['device']}; by"
    yield ""
    yield from (
        f"- {line}" for line in dict.fromkeys(f"{command(r)}, {r['date'][:10]}" for r in rows)
    )
    yield ""


def _number(req_per_s: float | None) -> str:
    return "-" if req_per_s is None else f"{req_per_s:.1f}"


def vllm_req_per_s(row: Result) -> float | None:
    """The best recorded one of the row's trace; None where there is none."""
    config = row["config"]
    if config["alpha"] != RECORDED_ALPHA:
        return None
    settings = vllm_runs(row["device"], config["model"], config["ranks"]).values()
    found = [run for runs in settings for run in runs if run.adapters == config["adapters"]]
    return max((run.req_per_s for run in found), default=None)


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
