"""What docs/tensor-parallelism.md tells of several GPUs."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from benchmarks.figures_text import Result, source

NOTHING = "No committed result yet."
NAMES = {
    None: "one GPU",
    "replicated": "replicated",
    "slora": "S-LoRA's",
    "silent": "S-LoRA's without its exchange (wrong tokens)",
}


def ranks_text(results: Callable[[str], list[Result]]) -> str:
    """The generated section of the page."""
    rows = results("tensor_parallel")
    lines = ["", *_steps(rows), *_sums(results("collectives"))] if rows else ["", NOTHING, ""]
    return "\n".join(lines)


def rank_panels(rows: Sequence[Result]) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Of each card and model: its bars, requests a second by what ran."""
    for (model, device), group in groupby(sorted(rows, key=_place), key=_model):
        bars = dict[str, float]()
        for row in group:
            size, (base, adapted) = row["config"]["tensor_parallel"], row["metrics"]["traces"]
            bars.setdefault(f"{size}, base only", base["req_per_s"])
            bars[f"{size}, {_name(row)}"] = adapted["req_per_s"]
        yield f"{model}, {device}", list(bars.items())


def _steps(rows: Sequence[Result]) -> Iterator[str]:
    for (model, device), group in groupby(sorted(rows, key=_place), key=_model):
        of_model = list(group)
        config = of_model[0]["config"]
        ranks = "/".join(map(str, config["ranks"]))
        yield f"**{model}** on {device}, adapters of rank {ranks}, context {config['context']}:"
        yield ""
        yield (
            "| GPUs | LoRA | batch | step, ms | with adapters, ms | ideal, ms | collectives, ms "
            "| trace, req/s | with adapters, req/s | ideal, req/s |"
        )
        yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        for row in of_model:
            yield from _cells(row)
        yield ""
        yield from (f"{source(row)}.  " for row in of_model)
        yield ""


def _cells(row: Result) -> Iterator[str]:
    config, metrics = row["config"], row["metrics"]
    base_trace, trace = metrics["traces"]
    adapted = {of["batch"]: of for of in metrics["steps"] if of["adapters"]}
    launches = {of["batch"]: of for of in metrics["launches"] if of["adapters"]}
    for base in metrics["steps"]:
        if base["adapters"] == 0:
            step, talk = (of.get(base["batch"], {}) for of in (adapted, launches))
            yield (
                f"| {config['tensor_parallel']} | {_name(row)} | {base['batch']} "
                f"| {base['step_ms']:.2f} | {_number(step, 'step_ms')} "
                f"| {_number(step, 'ideal_ms')} | {_number(talk, 'collectives_ms')} "
                f"| {base_trace['req_per_s']:.2f} | {trace['req_per_s']:.2f} "
                f"| {_number(trace, 'ideal_req_per_s')} |"
            )


def _sums(rows: Sequence[Result]) -> Iterator[str]:
    """What one sum over the ranks takes, by its bytes."""
    for row in rows:
        ways = row["metrics"]["sums"]
        yield f"A sum over {row['config']['tensor_parallel']} GPUs, microseconds ({source(row)}):"
        yield ""
        yield f"| bytes | {' | '.join(way.removesuffix('_us') for way in ways)} |"
        yield f"|---:|{'---:|' * len(ways)}"
        for num_bytes in next(iter(ways.values()), {}):
            times = (_number(times, num_bytes) for times in ways.values())
            yield f"| {int(num_bytes):,} | {' | '.join(times)} |"
        yield ""


def _name(row: Result) -> str:
    config = row["config"]
    is_nccl = config["tensor_parallel"] > 1 and not config["one_shot_sums"]
    return NAMES[config["lora"]] + (", sums by NCCL" if is_nccl else "")


def _number(of: dict[str, Any], name: str) -> str:
    return f"{of[name]:.2f}" if name in of else "-"


def _model(row: Result) -> tuple[str, str]:
    return row["config"]["model"], row["device"]


def _place(row: Result) -> tuple[str, str, int, int, str]:
    """By model and card, then by number of GPUs, then as strategies are named."""
    config = row["config"]
    strategy = list(NAMES).index(config["lora"])
    return (*_model(row), config["tensor_parallel"], strategy, _name(row))
