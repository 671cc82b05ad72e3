"""What docs/measurements.md tells of the adapter store, and the plot of its memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures_text import Result, source

PLOT = Path("figures") / "store-memory.png"  # in docs
LRU, BELADY, MEASURED = "#264653", "#8d99ae", "#c8453b"


def store_scale_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        metrics, config = row["metrics"], row["config"]
        zipf = metrics["zipf"]
        backend, place, kept = "", "disk", "fetch_from_disk_ms"
        if over_redis(row):
            backend, place, kept = "over a Redis ", "the Redis", "fetch_from_redis_ms"
        yield (
            f"- A store {backend}with {config['adapters']:,} adapters of ranks "
            f"{', '.join(map(str, config['ranks']))} (tiny geometry): registers "
            f"{metrics['registered_per_s']:.0f} a second,"
        )
        yield (
            f"  starts in {metrics['start_s']['median']:.1f} s, holds "
            f"{metrics['resident_mib']:.0f} MiB, lists a page of {config['page_size']} in "
            f"{_times(metrics['list_page_ms'])} and by label in "
            f"{_times(metrics['list_by_label_ms'])};"
        )
        yield (
            f"  fetches from memory take {_times(metrics['fetch_from_memory_ms'])}, from {place} "
            f"{_times(metrics[kept])}. With memory for a tenth of the bytes, under Zipf,"
        )
        yield (
            f"  {zipf['hit_rate']:.1%} are found in memory (simulated LRU "
            f"{zipf['lru_hit_rate']:.1%}, Belady {zipf['belady_hit_rate']:.1%}"
            f"{'' if backend else f'; [plot]({PLOT.as_posix()})'}). Load average "
            f"{config['load_average']:.0f}."
        )
        yield f"  {source(row)}."


def over_redis(row: Result) -> bool:
    return bool(row["config"].get("backend") == "redis")


def store_fuzz_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        metrics = row["metrics"]
        kinds = ", ".join(
            f"{metrics[kind]['cases']:,} hostile {kind}" for kind in ("files", "configs")
        )
        grown_mib = max(0.0, metrics["grown_mib"])
        yield f"- {kinds}: all taken or refused as they should, in {grown_mib:.0f} MiB more."
        yield f"  {source(row)}."


def store_flood_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        metrics, config = row["metrics"], row["config"]
        yield (
            f"- {config['uploads']:,} uploads offered by one tenant over {config['connections']} "
            f"connections: {metrics['answers']['begun']} begun (its limit), the rest refused, in"
        )
        yield (
            f"  {metrics['grown_mib']:.0f} MiB more; another tenant's push took "
            f"{metrics['other_tenants_push_s']:.2f} s meanwhile."
        )
        yield f"  {source(row)}."


def store_mixed_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        metrics, config = row["metrics"], row["config"]
        p99_ms = {kind: metrics[f"{kind}_p99_ms"]["median"] for kind in ("quiet", "uploading")}
        yield (
            f"- Fetches through shared memory by {config['processes']} processes of "
            f"{config['streams']} streams at half of what they can do on this machine: p99 "
            f"{p99_ms['quiet']:.1f} ms,"
        )
        yield (
            f"  and {p99_ms['uploading']:.1f} ms beside one upload after another: "
            f"{_ratio(metrics['uploading_ratio'])} as much; beside a process that only keeps a"
        )
        yield f"  processor busy with what is left of it, {_ratio(metrics['hashing_ratio'])}."
        yield f"  {source(row)}."


def plot_memory(row: Result, path: Path) -> None:
    """Hit rates by the share of the bytes that memory holds."""
    zipf = row["metrics"]["zipf"]
    by_share: dict[str, dict[str, float]] = zipf["simulated_by_budget_share"]
    shares = [100 * float(share) for share in by_share]
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label, color in (
        ("belady", "Belady (simulated)", BELADY),
        ("lru", "LRU (simulated)", LRU),
    ):
        hits = [100 * rates[name] for rates in by_share.values()]
        axes.plot(shares, hits, color=color, label=label, marker=".")
    measured = 100 * zipf["budget_share"], 100 * zipf["hit_rate"]
    axes.plot(*measured, "D", color=MEASURED, label="the store, measured")
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("memory, % of the bytes of all page images")
    axes.set_ylabel("found in memory, %")
    adapters, fetches = row["config"]["adapters"], zipf["fetches"]
    axes.set_title(f"{fetches:,} fetches of {adapters:,} adapters, Zipf 1", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})  # the same bytes each time


def _ratio(ratio: dict[str, float]) -> str:
    """With what the half of the rounds in the middle gave."""
    return (
        f"{ratio['median']:.1f} times ({ratio['lower_quartile']:.1f} to "
        f"{ratio['upper_quartile']:.1f})"
    )


def _times(milliseconds: dict[str, Any]) -> str:
    return f"{milliseconds['p50']:.1f} ms (p99 {milliseconds['p99']:.1f})"
