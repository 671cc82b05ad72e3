"""What the router counts of the requests that pass through it."""

from collections import Counter

from lorry.router.request import Request, RequestState
from lorry.rpc.call_counts import CANCELLED, OK, Outcome
from lorry.rpc.errors import LorryError
from lorry.rpc.histogram import SECONDS, SHORT_SECONDS, Histogram


class RequestCounts:
    """Every request that is received ends in exactly one outcome, or is still in progress."""

    def __init__(self) -> None:
        self.received = 0
        self.ended: Counter[Outcome] = Counter()
        self.prompt_tokens = 0
        self.queue_s = Histogram(SECONDS)
        self.ttft_s = Histogram(SECONDS)
        self.token_gap_s = Histogram(SHORT_SECONDS)
        self.workers_lost = 0

    @property
    def output_tokens(self) -> int:
        """Every token is a request's first or follows another one."""
        return self.ttft_s.count + self.token_gap_s.count

    def refuse(self, error: LorryError) -> None:
        """Count the end of a request that was not taken."""
        self.ended[Outcome.of(error)] += 1

    def end(self, state: RequestState, error: LorryError | None) -> None:
        if error is not None:
            self.ended[Outcome.of(error)] += 1
        else:
            self.ended[OK if state is RequestState.FINISHED else CANCELLED] += 1

    def submit(self, request: Request, now_s: float) -> None:
        """Count a request that goes to a worker for the first time."""
        self.prompt_tokens += len(request.prompt_ids)
        self.queue_s.observe(now_s - request.arrival_s)

    def draw(self, request: Request, now_s: float) -> None:
        """Count a token; on the hot path."""
        if request.first_token_s is None:
            request.first_token_s = now_s
            self.ttft_s.observe(now_s - request.arrival_s)
        else:
            self.token_gap_s.observe(now_s - request.last_token_s)
        request.last_token_s = now_s
