"""What bounds a step and what may be under way beside it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    step_tokens: int  # rows of a step; at least max_running
    max_running: int
    max_context_tokens: int
    max_fetches: int = 32  # under way at once
    max_prefetches: int = 4  # fetches for no request begin below it: half of what the front does
    max_passed_over: int = 64  # admissions of younger requests that an older one puts up with
    max_considered: int = 256  # waiting requests tried in a step; others wait for adapters
    max_ahead: int = 32  # of them after the step is full, to bring their adapters nearer
    prefix_cache: bool = True
