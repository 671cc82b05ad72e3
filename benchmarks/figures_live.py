"""What README tells of whole services on a GPU: loads below and above capacity, cold adapters."""

from collections.abc import Iterator
from typing import Any

from benchmarks.figures_text import Result, source, spread

PLACES = {
    "memory": "as a page image in the store's memory",
    "disk": "on the store's disk, out of the page cache",
    "redis": "in a Redis on the same machine",
}


def live_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        config, metrics = row["config"], row["metrics"]
        yield (
            f"- A router, a store and a worker serve {config['model']} with {config['adapters']:,} "
            f"adapters of rank {config['rank']} (Zipf {config['alpha']:g}, prompts of "
            f"{config['prompt_tokens']}, outputs of {config['output_tokens']} tokens), open"
        )
        yield (
            f"  loop, at shares of their capacity, {metrics['capacity_req_per_s']:.1f} requests/s; "
            f"the objective is {config['slo_ttft_s']:g} s to the first token and "
            f"{config['slo_tpot_s']:g} s for each other, a first token alone takes "
            f"{metrics['alone_ttft_s'] * 1e3:.0f} ms:"
        )
        for load in metrics["loads"]:
            yield f"  {load['load']:g}: {_load(load)};"
        yield f"  {source(row)}."


def _load(load: dict[str, Any]) -> str:
    error = load["ttft_prediction_error"]["median"]
    return (
        f"attainment {load['attainment']:.1%} ({load['attainment_of_admitted']:.1%} of admitted), "
        f"goodput {load['goodput_req_per_s']:.1f}/s, aborted {load['aborted']:.1%}"
        f"{_percentiles(' after', load['abort_wait_s'])}, "
        f"first token{_percentiles('', load['ttft_s'])}, others{_percentiles('', load['tpot_s'])}, "
        f"median prediction error {error:.0%}"
    )


def _percentiles(what: str, seconds: dict[str, float] | None) -> str:
    if seconds is None:
        return ""
    return f"{what} {seconds['p50'] * 1e3:.0f} ms (p99 {seconds['p99'] * 1e3:.0f})"


def cold_tiers_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        config = row["config"]
        yield (
            f"- The first token of a cold adapter ({config['model']}, rank {config['rank']}, "
            "all modules) comes later than a warm one's by"
        )
        for tier, metrics in row["metrics"].items():
            yield (
                f"  {spread(metrics['later_ms'], '.1f')} ms where it lies {PLACES[tier]} "
                f"(a warm one takes {metrics['warm_ms']['median']:.1f} ms);"
            )
        yield f"  {source(row)}."
