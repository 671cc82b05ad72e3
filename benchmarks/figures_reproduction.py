"""What docs/reproduction.md tells of the paper's settings on this engine, and of baselines."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.figures_text import Result, source, spread

NOTHING = "No committed result yet."


def reproduction_text(results: Callable[[str], list[Result]]) -> str:
    """The generated section of docs/reproduction.md."""
    lines = ["", "### The paper's settings on this engine", ""]
    settings = results("reproduction")
    lines += [line for row in settings for line in _cells(row)] or [NOTHING, ""]
    lines += ["### Baselines on the same card", ""]
    baselines = [
        *(line for row in results("baselines.merged") for line in _merged(row)),
        *(line for row in results("baselines.packed") for line in _packed(row)),
        *(line for row in results("baselines.peft") for line in _peft(row)),
    ]
    lines += baselines or [NOTHING, ""]
    return "\n".join(lines)


def _cells(row: Result) -> Iterator[str]:
    config = row["config"]
    ranks = ", ".join(map(str, config["ranks"]))
    yield (
        f"**{config['setting'].upper()}** ({config['model']}, ranks {ranks}, a pool of "
        f"{config['pool_gib']:.0f} GiB, {config['cell_seconds']:g} s of requests a cell):"
    )
    yield ""
    yield (
        "| adapters | rate, req/s | cv | alpha | throughput, req/s | ideal, req/s "
        "| latency, s | first token, s "
        "| attainment | loads | evictions |"
    )
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for cell in row["metrics"]["cells"]:
        ideal = f"{cell['ideal_req_per_s']:.2f}" if "ideal_req_per_s" in cell else "-"
        yield (
            f"| {cell['adapters']} | {cell['rate']:g} | {cell['cv']:g} | {cell['alpha']:g} "
            f"| {cell['req_per_s']:.2f} | {ideal} | {cell['latency_s']['mean']:.2f} "
            f"| {cell['ttft_s']['mean']:.2f} | {cell['attainment']:.3f} "
            f"| {cell['adapter_loads']} | {cell['adapter_evictions']} |"
        )
    yield from _source(row)


def _merged(row: Result) -> Iterator[str]:
    yield from _title(row, "One merged adapter at a time against all on the fly")
    yield "| adapters | merged, req/s | on the fly, req/s | merging, s a run |"
    yield "|---:|---:|---:|---:|"
    for case in row["metrics"]["cases"]:
        yield (
            f"| {case['adapters']} | {spread(case['merged_req_per_s'], '.1f')} "
            f"| {spread(case['on_the_fly_req_per_s'], '.1f')} "
            f"| {spread(case['merging_s'], '.3f')} |"
        )
    yield from _source(row)


def _packed(row: Result) -> Iterator[str]:
    yield from _title(row, "Merged copies that share the card against one engine")
    yield "| adapters | copies, req/s | pool of each, GiB | one engine, req/s | its pool, GiB |"
    yield "|---:|---|---:|---|---:|"
    for case in row["metrics"]["cases"]:
        columns = [column for name in ("packed", "on_the_fly") for column in _rate(case[name])]
        yield f"| {case['copies']} | {' | '.join(columns)} |"
    yield from _source(row)


def _rate(found: dict[str, Any]) -> tuple[str, str]:
    if "does_not_fit" in found:
        return "do not fit", "-"
    return spread(found["req_per_s"], ".1f"), f"{found['pool_gib_of_each']:.1f}"


def _peft(row: Result) -> Iterator[str]:
    config = row["config"]
    what = f"transformers + peft, {config['adapters']} adapters, batches of up to {config['batch']}"
    yield from _title(row, what)
    yield "| mode | requests/s | output tokens/s | requests served | seconds |"
    yield "|---|---:|---:|---:|---:|"
    for mode, found in row["metrics"].items():
        yield (
            f"| {mode.replace('_', ' ')} | {found['req_per_s']:.3f} "
            f"| {found['out_tok_per_s']:.0f} | {found['requests']} | {found['seconds']:.0f} |"
        )
    yield from _source(row)


def _title(row: Result, what: str) -> Iterator[str]:
    config = row["config"]
    yield f"**{what}** ({config['model']}, ranks {', '.join(map(str, config['ranks']))}):"
    yield ""


def _source(row: Result) -> Iterator[str]:
    yield ""
    yield f"{source(row)}."
    yield ""
