"""What docs/tensor-parallelism.md tells of several GPUs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.figures_text import Result, source
from benchmarks.rank_ideal import RankIdeal, rank_ideal
from benchmarks.roofline import GIB
from lorry.client.bench.trace import TraceSpec

NOTHING = "No committed result yet."
NAMES = {
    None: "one GPU",
    "replicated": "replicated",
    "slora": "S-LoRA's",
    "silent": "S-LoRA's, no exchange",
}
DEFAULT = "replicated"  # of the worker
BATCH = 64  # of a projected step


def ranks_text(results: Callable[[str], list[Result]]) -> str:
    """The generated section of the page."""
    rows, measured = results("tensor_parallel"), results("collectives")
    if not rows:
        return f"\n{NOTHING}\n"
    plot = "![Requests a second by GPUs and how they share LoRA](figures/tensor-parallel.png)"
    tables = (*_models(rows, measured), *_projections(rows, measured), *_sums(measured))
    return "\n".join(["", plot, "", *tables])


def rank_figures(rows: list[Result]) -> Iterator[str]:
    """README's part: each model by its GPUs, as the worker does by default."""
    by_model = dict[tuple[str, str], list[str]]()
    for row in sorted(rows, key=_place):
        config, (_, adapted) = row["config"], row["metrics"]["traces"]
        if _is_default(row):
            told = f"{adapted['req_per_s']:.1f} on {config['tensor_parallel']}"
            by_model.setdefault(_model(row), []).append(told)
    models = (f"{model} {', '.join(of)} {device}" for (model, device), of in by_model.items())
    yield f"- Requests a second with {rows[0]['config']['adapters']} adapters, by GPUs"
    yield f"  ([docs/tensor-parallelism.md](docs/tensor-parallelism.md)): {'; '.join(models)}."


def rank_panels(rows: Sequence[Result]) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Of each card and model: its bars, requests a second by what ran."""
    for (model, device), group in groupby(sorted(rows, key=_place), key=_model):
        bars = dict[str, float]()
        for row in group:
            size, (base, adapted) = row["config"]["tensor_parallel"], row["metrics"]["traces"]
            bars.setdefault(f"{size}, base only", base["req_per_s"])
            bars[f"{size}, {_name(row)}"] = adapted["req_per_s"]
        yield f"{model}, {device}", list(bars.items())


def _models(rows: Sequence[Result], measured: Sequence[Result]) -> Iterator[str]:
    for (model, device), group in groupby(sorted(rows, key=_place), key=_model):
        of_model = list(group)
        config = of_model[0]["config"]
        ranks = "/".join(map(str, config["ranks"]))
        yield f"### {model}, {device}"
        yield ""
        yield f"Adapters of rank {ranks}. Decode steps at context {config['context']}:"
        yield ""
        yield from _steps(of_model, measured)
        yield f"A trace of {config['requests']} requests, all there at once:"
        yield ""
        yield from _traces(of_model, measured)
        yield from (f"{source(row)}.  " for row in of_model)
        yield ""


def _steps(rows: Sequence[Result], measured: Sequence[Result]) -> Iterator[str]:
    """An adapter for each sequence, where the pool has room for them."""
    yield (
        "| GPUs | LoRA | batch | step, ms | ideal, ms | with adapters, ms | ideal, ms "
        "| collectives, ms |"
    )
    yield "|---:|---|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        ideal = _ideal(row, measured)
        adapted = {step["batch"]: step for step in row["metrics"]["steps"] if step["adapters"]}
        talks = {of["batch"]: of for of in row["metrics"]["launches"] if of["adapters"]}
        for base in row["metrics"]["steps"]:
            if base["adapters"] == 0:
                cells = (*_step(base, ideal), *_step(adapted.get(base["batch"]), ideal))
                talk = _number(talks.get(base["batch"], {}), "collectives_ms")
                yield f"| {_who(row)} | {base['batch']} | {' | '.join(cells)} | {talk} |"
    yield ""


def _step(step: Mapping[str, Any] | None, ideal: RankIdeal | None) -> tuple[str, str]:
    """Measured and ideal."""
    if step is None:
        return "-", "-"
    known = ideal and ideal.step_ms(step["batch"], step["mean_context"], step["adapters"])
    return f"{step['step_ms']:.2f}", f"{known:.2f}" if known else "-"


def _traces(rows: Sequence[Result], measured: Sequence[Result]) -> Iterator[str]:
    adapters = rows[0]["config"]["adapters"]
    yield (
        f"| GPUs | LoRA | no adapters, req/s | of ideal | {adapters} adapters, req/s | of ideal "
        "| against no exchange |"
    )
    yield "|---:|---|---:|---:|---:|---:|---:|"
    silent = next((row for row in rows if row["config"]["lora"] == "silent"), None)
    for row in rows:
        shares = _shares(row, measured)
        base, adapted = (of["req_per_s"] for of in row["metrics"]["traces"])
        cost = "-"
        if silent is not None and row["config"]["lora"] not in (None, "silent"):
            cost = f"{adapted / silent['metrics']['traces'][1]['req_per_s'] - 1:+.1%}"
        yield (
            f"| {_who(row)} | {base:.2f} | {_percent(shares[0])} | {adapted:.2f} "
            f"| {_percent(shares[1])} | {cost} |"
        )
    yield ""


def _shares(row: Result, measured: Sequence[Result]) -> list[float | None]:
    """Of the ideal engine's requests a second: without and with adapters."""
    ideal, shares = _ideal(row, measured), list[float | None]()
    for trace in row["metrics"]["traces"]:
        known = ideal and ideal.req_per_s(_spec(row, trace["adapters"]), _pool_bytes(row))
        shares.append(trace["req_per_s"] / known if known else None)
    return shares


def _projections(rows: Sequence[Result], measured: Sequence[Result]) -> Iterator[str]:
    """More GPUs than were measured, from the runs with most."""
    most = {_model(row): row for row in sorted(rows, key=_place) if _is_default(row)}
    lines = [line for row in most.values() for line in _projection(row, measured)]
    if not lines:
        return
    yield "### More GPUs, projected"
    yield ""
    yield (
        f"Adapters {DEFAULT}. Steps are the ideal engine's, of {BATCH} sequences, without and "
        f"with {BATCH} adapters; *projected* is its trace at the share of it that the measured "
        "GPUs reach, each with the pool that it had there."
    )
    yield ""
    yield (
        "| model | GPUs | ideal step, ms | with adapters, ms | adapters | ideal, req/s "
        "| projected, req/s |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    yield from lines
    yield ""


def _projection(row: Result, measured: Sequence[Result]) -> Iterator[str]:
    config, share = row["config"], _shares(row, measured)[1]
    sizes = [int(size) for of in measured for size in of["metrics"]["products"]]
    for size in sorted({size for size in sizes if size > config["tensor_parallel"]}):
        ideal = _ideal(row, measured, size)
        if ideal is None or share is None:
            continue
        steps_ms = (ideal.step_ms(BATCH, config["context"], adapters) for adapters in (0, BATCH))
        adapters = config["adapters"]
        req_per_s = ideal.req_per_s(_spec(row, adapters), _pool_bytes(row))
        yield (
            f"| {config['model']} | {size} | {' | '.join(f'{ms:.2f}' for ms in steps_ms)} "
            f"| {adapters} | {req_per_s:.1f} | {req_per_s * share:.1f} |"
        )


def _ideal(row: Result, measured: Sequence[Result], size: int | None = None) -> RankIdeal | None:
    """Of as many GPUs as the row has, or of `size`."""
    config = row["config"]
    gpus = size or config["tensor_parallel"]
    sums = {
        of["config"]["tensor_parallel"]: of
        for of in measured
        if of["device"] == row["device"] and of["metrics"]["sums"]
    }
    if not sums:
        return None
    nearest = max((of for of in sums if of <= gpus), default=min(sums))
    return rank_ideal(sums[nearest], config["model"], gpus, config["ranks"])


def _is_default(row: Result) -> bool:
    return row["config"]["lora"] in (None, DEFAULT) and row["config"]["one_shot_sums"]


def _spec(row: Result, adapters: int) -> TraceSpec:
    config = row["config"]
    return TraceSpec(requests=config["requests"], adapters=adapters, seed=config["trace_seed"])


def _pool_bytes(row: Result) -> float:
    return float(row["metrics"]["pool_gib"] * GIB)


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


def _who(row: Result) -> str:
    return f"{row['config']['tensor_parallel']} | {_name(row)}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


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
