"""How many requests any schedule at all could serve in time: a bound, where hindsight is a guess.

Of one worker that preempts nobody and makes no pause while it has work. Let C be the requests of
which such a schedule has the first token within `S` of their arrival `a`, and let t1 <= t2 be
arrivals of two of them.

1. *Work.* The steps of a request cost its own rows and the cached tokens that it reads; and of what
   is shared, its part at least: of a step's constant what its context and its part of its adapter
   take of the pool, since all contexts and adapters of a step fit there; of its adapter the share
   of one among all requests for it. These parts add up to no more than the steps take.
2. *By t2 + S* all of C that came in [t1, t2] have begun, not before t1. So their work, less what is
   left of it then, fits in t2 + S - t1.
3. *What is left.* One that came at `a` has run for t2 - a at least, in every step since its first
   token, each of which takes no longer than the longest step that there is. So it has drawn a known
   number of tokens at least, which is when most of its work is left and its context is smallest.
   All contexts fit in the pool: what is left of all is no more than the best filling of the pool
   with such requests, of which one may be cut.
4. So the work of C in [t1, t2] is at most `due(t2)` - t1, where `due` adds to t2 + S what can be
   left. That is all that it takes for the jobs of C, one after another on one machine, to end by
   what `due` says of each; it is made to grow with t2, which only allows more. The largest set of
   jobs that can, `most_in_time` finds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.simulation.clairvoyant import Job, most_in_time
from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.run import Setting
from benchmarks.simulation.worker import PAGE_TOKENS
from lorry.client.bench.trace import TraceRequest

Array = np.ndarray[tuple[int], np.dtype[np.float64]]
Indices = np.ndarray[tuple[int], np.dtype[np.intp]]


@dataclass(frozen=True, slots=True)
class Demands:
    """What each request asks of the worker, by arrival; what an adapter takes in equal parts."""

    arrival_s: Array
    prompt: Array  # tokens
    output: Array
    rank: Array
    adapter: Array  # its weights, in tokens of KV cache

    def __getitem__(self, chosen: Indices | slice) -> "Demands":
        return Demands(
            self.arrival_s[chosen],
            self.prompt[chosen],
            self.output[chosen],
            self.rank[chosen],
            self.adapter[chosen],
        )


def most_within_slo(setting: Setting, costs: LinearCosts, trace: Sequence[TraceRequest]) -> int:
    """That have their first token within `setting.slo`, at most, by any schedule."""
    assert setting.num_workers == 1, "a bound is known of one worker"
    demands = demands_of(setting, trace)
    pool_tokens = setting.limits.pool_pages * PAGE_TOKENS
    work_s = work_of(demands, costs, pool_tokens)
    longest_s = longest_step_s(setting, costs)
    jobs, due_s = list[Job](), 0.0
    for index, arrival_s in enumerate(demands.arrival_s.tolist()):
        left_s = most_left_s(demands[: index + 1], costs, pool_tokens, longest_s)
        due_s = max(due_s, arrival_s + setting.slo.ttft_s + left_s)
        jobs.append(Job(index, arrival_s, float(work_s[index]), due_s))
    return len(most_in_time(jobs))


def demands_of(setting: Setting, trace: Sequence[TraceRequest]) -> Demands:
    adapters = [setting.adapter_of(request) for request in trace]
    uses = Counter(adapter.version for adapter in adapters)
    token_bytes = setting.limits.page_bytes / PAGE_TOKENS
    return Demands(
        arrival_s=np.array([request.arrival_s for request in trace]),
        prompt=np.array([float(request.prompt_tokens) for request in trace]),
        output=np.array([float(request.output_tokens) for request in trace]),
        rank=np.array([a.rank / uses[a.version] for a in adapters]),
        adapter=np.array([a.num_bytes / token_bytes / uses[a.version] for a in adapters]),
    )


def longest_step_s(setting: Setting, costs: LinearCosts) -> float:
    """All rows that a step may have, and a pool full of contexts and full of adapters."""
    limits = setting.limits
    return costs.step_s(
        rows=limits.step_tokens,
        sampled=0,
        kv_tokens=limits.pool_pages * PAGE_TOKENS,
        rank_sum=limits.pool_pages * limits.page_bytes // setting.bytes_per_rank,
    )


def work_of(demands: Demands, costs: LinearCosts, pool_tokens: int) -> Array:
    """Seconds of each request's parts of the steps, its prompt in one of them."""
    held = (demands.prompt + demands.adapter) / pool_tokens
    prompt_ms = costs.row_ms * demands.prompt + costs.rank_ms * demands.rank + costs.step_ms * held
    return 1e-3 * prompt_ms + decoding_s(demands, np.ones_like(held), costs, pool_tokens)


def decoding_s(demands: Demands, drawn: Array, costs: LinearCosts, pool_tokens: int) -> Array:
    """Seconds of its parts of the steps after so many tokens were drawn."""
    steps = demands.output - drawn
    context = steps * demands.prompt + steps * (demands.output - 1 + drawn) / 2  # over the steps
    milliseconds = (
        costs.row_ms * steps
        + costs.kv_token_ms * context
        + costs.rank_ms * demands.rank * steps
        + costs.step_ms * (context + demands.adapter * steps) / pool_tokens
    )
    return 1e-3 * milliseconds


def most_left_s(demands: Demands, costs: LinearCosts, pool_tokens: int, longest_s: float) -> float:
    """Seconds of work that the requests can have left when the last one must have begun."""
    since_s = demands.arrival_s[-1] - demands.arrival_s
    drawn = 1 + np.floor(since_s / longest_s)
    active = np.nonzero(drawn < demands.output)[0]
    demands, drawn = demands[active], drawn[active]
    left_s = decoding_s(demands, drawn, costs, pool_tokens)
    return best_filling(left_s, demands.prompt + drawn + demands.adapter, pool_tokens)


def best_filling(values: Array, sizes: Array, room: float) -> float:
    """The greatest value that fits in the room, where the last one taken may be cut."""
    best_first = np.argsort(-values / sizes)
    values, sizes = values[best_first], sizes[best_first]
    left = np.maximum(0.0, room - (np.cumsum(sizes) - sizes))  # when its turn comes
    return float((values * np.minimum(1.0, left / sizes)).sum())
