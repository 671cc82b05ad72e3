"""Writes what README tells of measurements, and plots, from committed results: `make figures`."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures_engine import engine_figures
from benchmarks.figures_gpu import cold_figures, copies_figures, start_figures, step_figures
from benchmarks.figures_live import cold_tiers_figures, live_figures
from benchmarks.figures_performance import performance_text
from benchmarks.figures_plots import draw_plots, drawings
from benchmarks.figures_ranks import rank_figures, ranks_text
from benchmarks.figures_reproduction import reproduction_text
from benchmarks.figures_scheduling import DOCS, draw_scheduling, scheduling_text
from benchmarks.figures_scheduling import TITLES as STUDIES
from benchmarks.figures_store import (
    PLOT,
    over_redis,
    plot_memory,
    store_flood_figures,
    store_fuzz_figures,
    store_mixed_figures,
    store_scale_figures,
)
from benchmarks.figures_text import Result, source, spread
from benchmarks.results_file import RESULTS

README = Path(__file__).parents[1] / "README.md"
MEASUREMENTS = DOCS / "measurements.md"
SCHEDULING, PERFORMANCE = DOCS / "scheduling.md", DOCS / "performance.md"
REPRODUCTION, RANKS = DOCS / "reproduction.md", DOCS / "tensor-parallelism.md"
Parts = dict[str, Callable[[list[Result]], Iterator[str]]]  # what is told of each benchmark
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->"


def results(benchmark: str, directory: Path = RESULTS) -> list[Result]:
    """Committed results of a benchmark, by file name."""
    files = sorted(directory.glob("*.json"))
    found = [json.loads(path.read_text()) for path in files]
    return [result for result in found if result["benchmark"] == benchmark]


def figures(directory: Path = RESULTS) -> str:
    """README's section between the markers."""
    throughput = [*_plot_of_throughput(directory), *_told(THROUGHPUT, directory)]
    services = [*_told(OF_README, directory)]
    title = "Several GPUs, cold adapters, whole services, starts and faults:"
    between = [title, ""] if services else []
    return "\n".join([*throughput, *between, *services]) + "\n"


def measurements_text(directory: Path = RESULTS) -> str:
    """That of the page that tells the rest."""
    return "\n".join(["", *_told(OF_MEASUREMENTS, directory), ""])


def _told(parts: Parts, directory: Path) -> Iterator[str]:
    for benchmark, tell in parts.items():
        if rows := results(benchmark, directory):
            yield from tell(rows)


def _plot_of_throughput(directory: Path) -> Iterator[str]:
    if "throughput.png" in drawings(partial(results, directory=directory)):
        yield "![Requests a second by number of adapters](docs/figures/throughput.png)"
        yield ""
        yield (
            "vLLM's figures are of version 0.26.0 on the same card and traces, in the settings "
            "named, which need not be its best (`benchmarks/recorded.py`). How far the engine is "
            "from the ideal, and why: [docs/performance.md](docs/performance.md). Steps, copies, "
            "router and store: [docs/measurements.md](docs/measurements.md)."
        )
        yield ""


def _router(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        clients = row["config"]["clients"]
        yield f"- Tokens that the router streams per CPU-second to {clients} clients:"
        rates = row["metrics"].items()
        yield f"  {', '.join(f'{_rate(rate)} ({load})' for load, rate in rates)}."
        yield f"  {source(row)}."


def _rate(metrics: dict[str, Any]) -> str:
    return spread(metrics["tokens_per_cpu_s"], ",.0f")


def _store(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        config, metrics = row["config"], row["metrics"]
        yield (
            f"- A worker gets a page image of {config['image_bytes'] / 2**20:.0f} MiB "
            f"({config['model']}, rank {config['rank']}, all modules) from the store"
        )
        yield (
            f"  through shared memory at {spread(metrics['map_and_copy_share_of_memcpy'], '.2f')} "
            "of memcpy (map and copy;"
        )
        yield (
            f"  {spread(metrics['shared_memory_share_of_memcpy'], '.2f')} with the call; map and "
            f"copy in small pages {spread(metrics['small_pages_share_of_memcpy'], '.2f')}),"
        )
        yield (
            f"  in chunks at {spread(metrics['chunks_gb_per_s'], '.2f')} GB/s (bare grpc.aio "
            f"{spread(metrics['bare_grpc_gb_per_s'], '.2f')})."
        )
        yield f"  {source(row)}."


def _soak(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        metrics = row["metrics"]
        faults = [
            f"{fault} {count} times"
            for fault, count in metrics["faults"].items()
            if fault.endswith(("killed", "drained"))
        ]
        found = len(metrics["violations"]) or "nothing"
        yield (
            f"- A soak of {metrics['seconds']:,.0f} s: {metrics['requests']:,} requests, "
            f"{metrics['tokens']:,} tokens, {', '.join(faults)}; {found} wrong or left."
        )
        yield f"  {source(row)}."


THROUGHPUT: Parts = {"engine": engine_figures}
OF_README: Parts = {
    "tensor_parallel": rank_figures,
    "cold": cold_figures,
    "cold_tiers": cold_tiers_figures,
    "live": live_figures,
    "start": start_figures,
    "soak": _soak,
}
OF_MEASUREMENTS: Parts = {
    "step": step_figures,
    "copies": copies_figures,
    "router": _router,
    "store": _store,
    "store_scale": store_scale_figures,
    "store_mixed": store_mixed_figures,
    "store_fuzz": store_fuzz_figures,
    "store_flood": store_flood_figures,
}


def studies() -> list[Result]:
    """Committed results of the policies' studies, in the order in which they are told."""
    return [result for study in STUDIES for result in results(f"studies.{study}")]


def replace_figures(page: Path, text: str) -> None:
    """Write what stands between the page's markers."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(before + BEGIN + text + END + after)


def main() -> None:
    replace_figures(README, figures())
    replace_figures(MEASUREMENTS, measurements_text())
    replace_figures(SCHEDULING, scheduling_text(studies()))
    replace_figures(PERFORMANCE, performance_text(results))
    replace_figures(REPRODUCTION, reproduction_text(results))
    replace_figures(RANKS, ranks_text(results))
    draw_scheduling(studies())
    draw_plots(results)
    for row in results("store_scale"):
        if not over_redis(row):
            plot_memory(row, DOCS / PLOT)


if __name__ == "__main__":
    main()
