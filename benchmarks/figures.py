"""Writes what README tells of measurements, from the committed result files: `make figures`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->"


def results(benchmark: str) -> list[dict[str, Any]]:
    """Committed results of a benchmark, by file name."""
    files = sorted(RESULTS.glob("*.json"))
    found = [json.loads(path.read_text()) for path in files]
    return [result for result in found if result["benchmark"] == benchmark]


def figures() -> str:
    """The section between the markers."""
    return "\n".join([*_engine(), *_router(), *_store()]) + "\n"


def _engine() -> Iterator[str]:
    rows = results("engine")
    if not rows:
        return
    yield (
        "Offline throughput of the engine on one GPU: all requests of a trace submitted at once, "
        "median of the runs; *ideal* is the yardstick of `benchmarks/roofline.py`."
    )
    yield ""
    yield "| model | adapters | ranks | popularity | req/s | ideal req/s | output tokens/s |"
    yield "|---|---:|---|---|---:|---:|---:|"
    for row in sorted(rows, key=_engine_order):
        config, metrics = row["config"], row["metrics"]
        has_adapters = config["adapters"] > 0
        yield (
            f"| {config['model']} | {config['adapters'] or 'none'} "
            f"| {', '.join(map(str, config['ranks'])) if has_adapters else '-'} "
            f"| {_popularity(config['alpha']) if has_adapters else '-'} "
            f"| {metrics['req_per_s']:.1f} | {metrics['ideal_req_per_s']:.1f} "
            f"| {metrics['out_tok_per_s']:,.0f} |"
        )
    yield ""
    yield f"{_source(rows[0])}, and likewise for the other rows."
    yield ""


def _engine_order(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["config"]["model"], row["config"]["adapters"], max(row["config"]["ranks"])


def _popularity(alpha: float) -> str:
    return "uniform" if alpha == 0 else f"Zipf {alpha:g}"


def _router() -> Iterator[str]:
    for row in results("router"):
        clients = row["config"]["clients"]
        yield f"- Tokens that the router streams per CPU-second to {clients} clients:"
        rates = row["metrics"].items()
        yield f"  {', '.join(f'{_rate(rate)} ({load})' for load, rate in rates)}."
        yield f"  {_source(row)}."


def _rate(metrics: dict[str, Any]) -> str:
    return _spread(metrics["tokens_per_cpu_s"], ",.0f")


def _store() -> Iterator[str]:
    for row in results("store"):
        config, metrics = row["config"], row["metrics"]
        yield (
            f"- A worker gets a page image of {config['image_bytes'] / 2**20:.0f} MiB "
            f"({config['model']}, rank {config['rank']}, all modules) from the store"
        )
        yield (
            f"  through shared memory at {_spread(metrics['map_and_copy_share_of_memcpy'], '.2f')} "
            "of memcpy (map and copy;"
        )
        yield (
            f"  {_spread(metrics['shared_memory_share_of_memcpy'], '.2f')} with the call), in "
            f"chunks at {_spread(metrics['chunks_gb_per_s'], '.2f')} GB/s."
        )
        yield f"  {_source(row)}."


def _spread(value: dict[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['min']:{form}} to {value['max']:{form}})"


def _source(row: dict[str, Any]) -> str:
    return f"`{row['command']}`, {row['device']}, {row['date'][:10]}"


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(before + BEGIN + figures() + END + after)


if __name__ == "__main__":
    main()
