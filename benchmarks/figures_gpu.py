"""What README and docs/measurements.md tell of the engine's parts on a GPU."""

from collections.abc import Iterator

from benchmarks.figures_text import Result, source, spread


def step_figures(rows: list[Result]) -> Iterator[str]:
    """The largest case of each result: the first context, most sequences and adapters."""
    for row in rows:
        cases = row["metrics"]["cases"]
        case = max(cases, key=lambda case: (case["batch"], case["adapters"], -case["rank"]))
        yield (
            f"- A decode step of batch {case['batch']} at context {case['mean_context']}, "
            f"adapters: {case['adapters']}, rank {case['rank']} ({row['config']['model']}):"
        )
        ideal = f", ideal {case['ideal_ms']:.2f} ms" if "ideal_ms" in case else ""
        kernels = f", {case['kernels']:.0f} kernels" if "kernels" in case else ""
        yield (
            f"  {case['step_ms']:.2f} ms{ideal}; the host plans {case['plan_ms']:.2f} ms, launches "
            f"{case['launch_ms']:.2f} ms, commits {case['commit_ms']:.2f} ms{kernels}."
        )
        yield f"  {source(row)}."


def copies_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        yield "- Page images reach scattered pages of the GPU at (GB/s, median and spread):"
        for load in row["metrics"]["loads"]:
            if load["places"] == "scattered":
                yield (
                    f"  {spread(load['gb_per_s'], '.1f')} {load['memory']}, {load['model']} "
                    f"rank {load['rank']} ({load['image_mib']:.0f} MiB);"
                )
        yield f"  {source(row)}."


def cold_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        config, metrics = row["config"], row["metrics"]
        cold, resident = metrics["cold"], metrics["resident"]
        yield (
            f"- {config['streams']} streams ({config['model']}, context {config['context']}) "
            f"beside a request every {config['interval']:g} s on a never-seen adapter:"
        )
        yield (
            f"  token gap {_gaps(cold)}; the same with a resident adapter {_gaps(resident)}. "
            f"First token {_first(cold)}, resident {_first(resident)}."
        )
        yield f"  {source(row)}."


def _gaps(metrics: Result) -> str:
    gap_s = metrics["token_gap_s"]
    return f"{gap_s['p50'] * 1e3:.2f} ms (p50), {gap_s['p99'] * 1e3:.2f} ms (p99)"


def _first(metrics: Result) -> str:
    return f"{metrics['first_token_s']['p50'] * 1e3:.1f} ms (p50)"


def start_figures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        seconds = row["metrics"]
        yield (
            f"- A worker ({row['config']['model']}) has its first token "
            f"{seconds['cold_first_token_s']:.1f} s after its start, "
            f"{seconds['warm_first_token_s']:.1f} s where its kernels are in the cache on disk;"
        )
        yield (
            f"  it listens after {seconds['cold_listening_s']:.1f} s, with its weights and graphs "
            f"it is ready after {seconds['cold_ready_s']:.1f} and {seconds['warm_ready_s']:.1f} s."
        )
        yield f"  {source(row)}."
