"""When a request would get its first token, and how fast the others would follow."""

from typing import Protocol

from lorry.router.request import Request
from lorry.router.worker import Worker


class Predictor(Protocol):
    def service_s(self, request: Request, worker: Worker) -> float:
        """From a submit now to the first token."""
        ...

    def tpot_s(self, worker: Worker) -> float:
        """Of a request that joins now."""
        ...


class PriorPredictor:
    """Knows no more than what the worker measures."""

    def service_s(self, request: Request, worker: Worker) -> float:
        rate = worker.status.prefill_tokens_per_s
        return len(request.prompt_ids) / rate if rate else 0.0

    def tpot_s(self, worker: Worker) -> float:
        return max(worker.status.step_s.values(), default=0.0)
