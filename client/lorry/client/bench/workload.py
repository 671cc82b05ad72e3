"""Which requests a run sends, and for which of the store's adapters."""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from lorry.client.bench.lengths import parse_lengths
from lorry.client.bench.trace import (
    DEFAULT_TENANT,
    NO_ADAPTER,
    Burst,
    TraceRequest,
    TraceSpec,
    make_trace,
    until,
)
from lorry.client.bench.trace_file import read_trace
from lorry.client.console import make_table

if TYPE_CHECKING:
    from lorry.client.commands.bench import TraceOptions

SHOWN_ADAPTERS = 5
ListAdapters = Callable[[str], Awaitable[list[str]]]  # of a tenant


async def plan(options: "TraceOptions", list_adapters: ListAdapters) -> list[TraceRequest]:
    """The requests by arrival; the store is asked only for how many adapters there are.

    Raises ValueError naming what is wrong.
    """
    if options.trace is not None:
        trace = read_trace(options.trace)
    else:
        trace = make_trace(_spec(options, await _num_adapters(options, list_adapters)))
    if options.duration_s is not None:
        trace = until(trace, options.duration_s)
    if not trace:
        raise ValueError(f"no request arrives within duration_s {options.duration_s}")
    return trace


async def adapter_names(
    trace: Sequence[TraceRequest], pattern: str, list_adapters: ListAdapters
) -> dict[str, list[str]]:
    """What the numbers of the trace's adapters stand for, by tenant.

    Raises ValueError naming a tenant that has too few.
    """
    needed = 1 + max(request.adapter for request in trace)
    tenants = sorted({request.tenant for request in trace})
    if pattern or not needed:
        return {
            tenant: [pattern.replace("{n}", str(n)) for n in range(needed)] for tenant in tenants
        }
    names = {tenant: await list_adapters(tenant) for tenant in tenants}
    for tenant, found in names.items():
        if len(found) < needed:
            raise ValueError(
                f"the trace needs {needed} adapters of tenant {tenant}, "
                f"the store lists {len(found)}"
            )
    return names


async def _num_adapters(options: "TraceOptions", list_adapters: ListAdapters) -> int:
    if options.adapters is not None:
        return options.adapters
    if options.adapter_names:
        raise ValueError("adapter_names needs adapters, the number of them")
    tenants = list(options.shares()) or [DEFAULT_TENANT]
    return min([len(await list_adapters(tenant)) for tenant in tenants])


def _spec(options: "TraceOptions", num_adapters: int) -> TraceSpec:
    return TraceSpec(
        requests=options.requests,
        adapters=num_adapters,
        alpha=options.alpha,
        rate=options.rate,
        cv=options.cv,
        prompt_tokens=parse_lengths(options.prompt_tokens),
        output_tokens=parse_lengths(options.output_tokens),
        bursts=tuple(map(Burst.parse, options.burst)),
        tenants=options.shares() or {DEFAULT_TENANT: 1.0},
        seed=options.seed,
    )


def trace_summary(trace: Sequence[TraceRequest]) -> Table:
    table = make_table("trace", "")
    arrivals = np.array([request.arrival_s for request in trace])
    table.add_row("requests", f"{len(trace)} in {arrivals[-1]:.1f} s")
    if len(trace) > 2:
        gaps = np.diff(arrivals)
        cv = f"cv of the gaps {gaps.std() / gaps.mean():.2f}" if gaps.mean() else "all at once"
        busiest = np.bincount(arrivals.astype(int)).max()
        table.add_row("arrivals", f"{1 / gaps.mean():.2f}/s, {cv}, {busiest} in the busiest second")
    for label in ("prompt_tokens", "output_tokens"):
        lengths = np.array([getattr(request, label) for request in trace])
        table.add_row(
            label.replace("_", " "),
            f"{lengths.sum():,}: {lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f}",
        )
    asked = Counter(r.adapter for r in trace if r.adapter != NO_ADAPTER)
    top = ", ".join(f"{n / len(trace):.1%}" for _, n in asked.most_common(SHOWN_ADAPTERS))
    table.add_row("adapters", f"{len(asked)} asked for; the most popular get {top or '-'}")
    for tenant, count in Counter(request.tenant for request in trace).most_common():
        table.add_row(f"tenant {tenant}", f"{count} requests")
    return table
