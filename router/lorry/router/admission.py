"""Which requests are aborted because their objective is out of reach."""

from typing import Protocol

from lorry.router.request import Request


class Admission(Protocol):
    def latest_start_s(self, request: Request, service_s: float) -> float | None:
        """When a request that would take `service_s` to its first token is aborted if it still
        waits; None: never."""
        ...


class AdmitAll:
    """Nobody is aborted."""

    def latest_start_s(self, request: Request, service_s: float) -> float | None:
        return None


class EarlyAbort:
    """Whoever cannot have its first token in time any more, as far as is predicted."""

    def latest_start_s(self, request: Request, service_s: float) -> float | None:
        ttft_s = request.slo.ttft_s
        return None if ttft_s is None else request.arrival_s + ttft_s - service_s
