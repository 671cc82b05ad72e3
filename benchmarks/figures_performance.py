"""What docs/performance.md tells of steps, from committed results."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.card import find_card
from benchmarks.figures_engine import ideal_req_per_s
from benchmarks.figures_plots import drawings
from benchmarks.figures_text import Result, source

PLOTS = {  # beside the one in the README
    "rank-mix.png": "Requests a second by ranks",
    "step-floor.png": "Decode steps and their floors",
    "memory-split.png": "The pool between KV and adapters over time",
    "ablation.png": "Requests a second without a part of the design",
}
LAYERS = 32  # of both models
ROWS = 64
EXPAND, ROPE = "expand of q, k, v", "RoPE and writing KV"
# Kernels of a layer, of the case that was measured nearest to a decode step of ROWS sequences.
PARTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "llama-3-8b": (
        ("attention, 64 at context 512", "attention", "8B B64 ctx512"),
        ("shrink of q, k, v; 64 adapters of rank 16", "lora", "8B B64 n64 r16 qkv shrink"),
        (EXPAND, "lora", "8B B64 n64 r16 qkv expand"),
        ("shrink of o", "lora", "8B B64 n64 r16 o shrink"),
        ("expand of o", "lora", "8B B64 n64 r16 o expand"),
    ),
    "llama-2-7b": (
        ("attention, 64 at context 1024", "attention", "7B B64 ctx1024"),
        ("shrink of q, k, v; 64 adapters of rank 16", "lora", "7B B64 n64 r16 qkv shrink"),
        (EXPAND, "lora", "7B B64 n64 r16 qkv expand"),
        ("shrink of o", "lora", "7B B64 n64 r16 o shrink"),
        ("expand of o", "lora", "7B B64 n64 r16 o expand"),
    ),
}
BETWEEN = (
    ("RMS norms, two", "RMSNorm, 64 rows", 2),
    (ROPE, "RoPE + KV write, 64 rows", 1),
    ("SwiGLU", "SwiGLU, 64 rows", 1),
)


def performance_text(results: Callable[[str], list[Result]]) -> str:
    """The generated section of docs/performance.md."""
    lines: list[str] = []
    for kernels in results("kernels"):
        for model in PARTS:
            lines += _parts(kernels, model)
    lines += _whole([row for row in results("engine") if row["config"].get("rate") is None])
    for step in results("step"):
        lines += _steps(step)
    for fused in results("fused"):
        lines += _fused(fused)
    lines += [f"![{PLOTS[name]}](figures/{name})\n" for name in drawings(results) if name in PLOTS]
    return "\n".join(["", *lines]) + "\n"


def _parts(kernels: Result, model: str) -> Iterator[str]:
    card = find_card(kernels["device"])
    if card is None:
        return
    yield f"### Kernels of a decode step, {model}, {ROWS} sequences, {kernels['device']}"
    yield ""
    yield "| part | measured, ms a step | floor, ms a step | measured / floor |"
    yield "|---|---:|---:|---:|"
    products_ms = card.products[model].ms(ROWS, ROWS)
    yield _row("matrix products and head", products_ms, products_ms)
    total_ms, floors_ms = products_ms, products_ms
    for name, measured_ms, floor_ms in _of_layers(kernels["metrics"], model):
        yield _row(name, measured_ms, floor_ms)
        total_ms, floors_ms = total_ms + measured_ms, floors_ms + floor_ms
    yield _row("**sum, one after the other**", total_ms, floors_ms)
    yield ""
    yield f"{source(kernels)}."
    yield ""


def _of_layers(metrics: dict[str, Any], model: str) -> Iterator[tuple[str, float, float]]:
    fused = metrics.get("fused")  # one kernel for two of the parts, where it was measured
    for name, kind, case in PARTS[model]:
        if fused and name == EXPAND:
            one = case.replace("qkv expand", "expand + RoPE, one kernel")
            yield f"{EXPAND}, {ROPE}", *_ms(fused[one])
        else:
            yield name, *_ms(metrics[kind][case])
    for name, case, count in BETWEEN:
        if not (fused and name == ROPE):
            yield name, *_ms(metrics["rows"][case], count)


def _ms(case: dict[str, float], count: int = 1) -> tuple[float, float]:
    """Of all layers: measured, and the floor."""
    scale = count * LAYERS / 1e3
    return case["us"] * scale, case["floor_us"] * scale


def _row(name: str, measured_ms: float, floor_ms: float) -> str:
    return f"| {name} | {measured_ms:.2f} | {floor_ms:.2f} | {measured_ms / floor_ms:.2f} |"


def _whole(rows: Sequence[Result]) -> Iterator[str]:
    known = [(row, ideal) for row in rows if (ideal := ideal_req_per_s(row))]
    if not known:
        return
    yield "### Whole traces against the ideal engine"
    yield ""
    yield (
        "| model | adapters | ranks | requests/s of ideal | steps | ms a step | ideal ms a step "
        "| planned, ms | launched, ms | rows of padding a step |"
    )
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    for row, ideal in sorted(known, key=_order):
        metrics, config = row["metrics"], row["config"]
        steps = metrics["steps"]
        ranks = ", ".join(map(str, config["ranks"])) if config["adapters"] else "-"
        yield (
            f"| {config['model']} | {config['adapters'] or 'none'} | {ranks} "
            f"| {metrics['req_per_s'] / ideal:.1%} "
            f"| {steps} | {metrics['seconds'] / steps * 1e3:.2f} "
            f"| {config['requests'] / ideal / steps * 1e3:.2f} "
            f"| {metrics['scheduler_ms_per_step']:.2f} | {metrics['launch_ms_per_step']:.2f} "
            f"| {metrics['padded_rows'] / steps:.1f} |"
        )
    yield ""
    yield (
        "Planning and launching overlap with the step before; the ideal engine's time is spread "
        "over the steps that the engine took."
    )
    yield ""


def _order(one: tuple[Result, float]) -> tuple[str, int, int]:
    config = one[0]["config"]
    return config["model"], config["adapters"], max(config["ranks"])


def _fused(row: Result) -> Iterator[str]:
    """Of the runs' savings, the smallest and the largest too."""
    config = row["config"]
    yield f"### LoRA of q, k and v with RoPE in one kernel, {config['model']}, {row['device']}"
    yield ""
    yield "| batch | adapters | rank | step, ms | by two kernels, ms | saved, µs |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for case in row["metrics"]["cases"]:
        saved_us = case["saved_us_of_runs"]
        yield (
            f"| {case['batch']} | {case['adapters']} | {case['rank']} | {case['step_ms']:.2f} "
            f"| {case['unfused_step_ms']:.2f} "
            f"| {case['saved_us']:.0f} ({min(saved_us):.0f} to {max(saved_us):.0f}) |"
        )
    yield ""
    yield f"Decodes at context {config['context']}. {source(row)}."
    yield ""


def _steps(row: Result) -> Iterator[str]:
    yield f"### Decode steps, {row['config']['model']}, {row['device']}"
    yield ""
    yield "| batch | context | adapters | rank | step, ms | ideal, ms | step / ideal |"
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for case in row["metrics"]["cases"]:
        ideal_ms = case.get("ideal_ms")
        told = (f"{ideal_ms:.2f}", f"{case['step_ms'] / ideal_ms:.2f}") if ideal_ms else ("-", "-")
        yield (
            f"| {case['batch']} | {case['mean_context']} | {case['adapters']} | {case['rank']} "
            f"| {case['step_ms']:.2f} | {told[0]} | {told[1]} |"
        )
    yield ""
    yield f"{source(row)}."
    yield ""
