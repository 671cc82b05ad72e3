"""Sends a trace to a router as `lorry bench` does."""

from collections.abc import Sequence

from lorry.client.bench.load import TokenRange
from lorry.client.bench.messages import Progress, Share
from lorry.client.bench.processes import run_parts, split
from lorry.client.bench.record import Record, Slo
from lorry.client.bench.trace import DEFAULT_TENANT, TraceRequest

MAX_OPEN = 4096


async def send(
    router: str,
    trace: Sequence[TraceRequest],
    slo: Slo,
    *,
    adapters: Sequence[str],  # names, by the trace's numbers
    token_ids: TokenRange,
    processes: int = 1,
    timeout_s: float = 120.0,  # of each request
) -> list[Record]:
    """What came of each request, in the trace's order."""
    ended = list[Record]()
    share = Share(
        router=router,
        tls=None,
        tokens={DEFAULT_TENANT: None},
        adapters={DEFAULT_TENANT: list(adapters)},
        token_ids=(token_ids.low, token_ids.high),
        timeout_s=timeout_s,
        max_open=MAX_OPEN,
        records=[Record(index, planned, slo) for index, planned in enumerate(trace)],
    )

    def note(part: int, progress: Progress) -> None:
        ended.extend(progress.ended)

    await run_parts(split(share, min(processes, len(trace))), note)
    return sorted(ended, key=lambda record: record.index)
