"""What was asked for and what came of it, for each request of a run, live or simulated."""

import math
from dataclasses import dataclass

from lorry.client.bench.trace import TraceRequest

OK = "OK"


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must meet; infinite: anything does."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"the SLO's {name} must be positive, got {getattr(self, name)}")


@dataclass(slots=True)
class Record:
    """Times are seconds since the trace's beginning. Every latency counts from the planned
    arrival, also where the request could not be sent in time: a slow server or client must not
    make its own load lighter and its latencies shorter."""

    index: int  # in the trace
    planned: TraceRequest
    slo: Slo = Slo()
    sent_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    output_tokens: int = 0
    ended_s: float | None = None
    code: str = ""  # of the status; empty while it runs
    reason: str = ""  # of the ErrorInfo; empty if there is none

    @property
    def ok(self) -> bool:
        return self.code == OK

    @property
    def admitted(self) -> bool:
        """Whether it got as far as a first token."""
        return self.first_token_s is not None

    @property
    def ttft_s(self) -> float | None:
        return _since(self.planned.arrival_s, self.first_token_s)

    @property
    def latency_s(self) -> float | None:
        return _since(self.planned.arrival_s, self.ended_s)

    @property
    def send_delay_s(self) -> float | None:
        """How late the load generator sent it."""
        return _since(self.planned.arrival_s, self.sent_s)

    @property
    def tpot_s(self) -> float | None:
        """From the first to the last token, by the tokens after the first."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def met_slo(self) -> bool:
        """Whether it ended well and in time; one that was refused or aborted has not."""
        ttft_s, tpot_s = self.ttft_s, self.tpot_s
        return (
            self.ok
            and ttft_s is not None
            and ttft_s <= self.slo.ttft_s
            and (tpot_s is None or tpot_s <= self.slo.tpot_s)
        )

    @property
    def satisfaction(self) -> float:
        """1 - (TTFT / SLO)^2 below the SLO, else 0 (S-LoRA, section 4.3)."""
        ttft_s = self.ttft_s
        if not self.ok or ttft_s is None or ttft_s >= self.slo.ttft_s:
            return 0.0
        return 1.0 - (ttft_s / self.slo.ttft_s) ** 2


def _since(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else end_s - start_s
