"""What caches of a byte budget would hold of a trace: the yardsticks of the store's RAM tier."""

import heapq
from collections import OrderedDict
from collections.abc import Mapping, Sequence

NEVER = 1 << 62


def lru_hits(trace: Sequence[int], sizes: Mapping[int, int], budget_bytes: int) -> int:
    """Hits of a cache that evicts what was used longest ago."""
    held: OrderedDict[int, int] = OrderedDict()
    used_bytes = hits = 0
    for item in trace:
        if item in held:
            held.move_to_end(item)
            hits += 1
            continue
        while used_bytes + sizes[item] > budget_bytes:
            used_bytes -= held.popitem(last=False)[1]
        held[item] = sizes[item]
        used_bytes += sizes[item]
    return hits


def belady_hits(trace: Sequence[int], sizes: Mapping[int, int], budget_bytes: int) -> int:
    """Hits of a cache that knows the future and evicts what is used again last.

    The best there is for items of one size; for mixed sizes a very good one.
    """
    next_uses = _next_uses(trace)
    held: dict[int, int] = {}  # item to the place of its next use
    farthest: list[tuple[int, int]] = []  # of (-next use, item); entries that moved on are stale
    used_bytes = hits = 0
    for place, item in enumerate(trace):
        if item in held:
            hits += 1
        else:
            while used_bytes + sizes[item] > budget_bytes:
                negative, victim = heapq.heappop(farthest)
                if held.get(victim) == -negative:
                    del held[victim]
                    used_bytes -= sizes[victim]
            used_bytes += sizes[item]
        held[item] = next_uses[place]
        heapq.heappush(farthest, (-next_uses[place], item))
    return hits


def _next_uses(trace: Sequence[int]) -> list[int]:
    """For each place of the trace, where its item comes next."""
    seen: dict[int, int] = {}
    result = [NEVER] * len(trace)
    for place in range(len(trace) - 1, -1, -1):
        result[place] = seen.get(trace[place], NEVER)
        seen[trace[place]] = place
    return result
