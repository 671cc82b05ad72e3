"""A scheduler that knows all arrivals and lengths before it begins: what hindsight is worth.

It chooses whom to serve so that as many as possible can be, and serves those by first come, first
served; it tells the others at once. Whom to serve is the problem of most jobs in time on one
machine, which Kise, Ibaraki and Mine (Operations Research 26, 1978) solve exactly where whoever
comes first is due first. A request's job is its share of the steps: of their constant cost by the
pages that it holds, and all that its own tokens and adapter cost. What the model of jobs leaves
out, two numbers make up for, and of several pairs the one that turns out best counts.

It is no bound: a better schedule may exist (`benchmarks.simulation.bound` tells how much better at
most). But no scheduler without foresight has its knowledge.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.run import Setting, simulate
from benchmarks.simulation.worker import PAGE_TOKENS
from lorry.client.bench.record import Record
from lorry.client.bench.trace import TraceRequest
from lorry.router.policy_options import PolicyOptions

WORK_FACTORS = (1.05, 1.15)  # of the jobs' lengths
OVERLAPS_S = (3.0, 7.0, 11.0)  # by which a job may end later: a batch holds several jobs at once
IN_TURN = PolicyOptions(
    order="arrival",
    overload_order="arrival",
    admission="all",
    fairness="none",
    cluster_adapters=0,
)


@dataclass(frozen=True, slots=True)
class Job:
    index: int
    arrival_s: float
    work_s: float
    due_s: float


def clairvoyant(
    setting: Setting, costs: LinearCosts, trace: Sequence[TraceRequest]
) -> list[Record]:
    """The records of the schedule in which most requests meet their objective."""
    jobs = jobs_of(setting, costs, trace)
    best: list[Record] = []
    for factor, overlap_s in product(WORK_FACTORS, OVERLAPS_S):
        scaled = [
            replace(job, work_s=factor * job.work_s, due_s=job.due_s + overlap_s) for job in jobs
        ]
        records = serve_only(setting, trace, most_in_time(scaled))
        if sum(r.met_slo for r in records) > sum(r.met_slo for r in best):
            best = records
    return best


def serve_only(setting: Setting, trace: Sequence[TraceRequest], served: set[int]) -> list[Record]:
    """The others are told at once that they are not."""
    indices = sorted(served)
    chosen = simulate(replace(setting, options=IN_TURN), [trace[index] for index in indices])
    found = {i: replace(record, index=i) for i, record in zip(indices, chosen, strict=True)}
    return [found.get(index) or _refused(index, r, setting) for index, r in enumerate(trace)]


def _refused(index: int, request: TraceRequest, setting: Setting) -> Record:
    return Record(index, request, setting.slo, code="ABORTED", ended_s=request.arrival_s)


def jobs_of(setting: Setting, costs: LinearCosts, trace: Sequence[TraceRequest]) -> list[Job]:
    """An adapter's cost and pages are shared by as many as have it in a twentieth of the trace."""
    pool_tokens = setting.limits.pool_pages * PAGE_TOKENS
    token_bytes = setting.limits.page_bytes / PAGE_TOKENS
    uses = Counter(request.adapter for request in trace)
    jobs = []
    for index, request in enumerate(trace):
        adapter, steps = setting.adapter_of(request), request.output_tokens
        sharing = 1 + (uses[request.adapter] - 1) / 20
        context = steps * request.prompt_tokens + steps * (steps - 1) / 2  # tokens over its steps
        held = context + steps * adapter.num_bytes / token_bytes / sharing
        milliseconds = (
            costs.step_ms * held / pool_tokens
            + costs.row_ms * (request.prompt_tokens + steps)
            + costs.kv_token_ms * context
            + costs.rank_ms * adapter.rank * steps / sharing
        )
        due_s = request.arrival_s + setting.slo.ttft_s
        jobs.append(Job(index, request.arrival_s, milliseconds / 1e3, due_s))
    return jobs


def most_in_time(jobs: Sequence[Job]) -> set[int]:
    """The largest set of jobs of which each ends by when it is due.

    `jobs` come by arrival, and are due in that order. One after another joins; if the last one ends
    too late, the job goes without which all others end earliest.
    """
    chosen: list[Job] = []
    for job in jobs:
        chosen.append(job)
        ends_s = ends_without(chosen)
        if ends_s[-1] > job.due_s:
            del chosen[int(np.argmin(ends_s[:-1]))]
    return {job.index for job in chosen}


def ends_without(jobs: Sequence[Job]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """When the last job ends without each of them, and at the end with all."""
    arrival_s = np.array([job.arrival_s for job in jobs])
    work_s = np.array([job.work_s for job in jobs])
    # The machine is busy from some job's arrival on until the end, with all that come from it on.
    busy_s = arrival_s + np.cumsum(work_s[::-1])[::-1]
    before = np.concatenate(([-np.inf], np.maximum.accumulate(busy_s)))[:-1]
    after = np.concatenate((np.maximum.accumulate(busy_s[::-1])[::-1][1:], [-np.inf]))
    return np.append(np.maximum(before - work_s, after), busy_s.max())
