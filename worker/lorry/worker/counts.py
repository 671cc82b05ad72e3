"""What the worker's front counts of the requests that pass through it."""

from collections import Counter

from lorry.rpc.call_counts import CANCELLED, OK, Outcome
from lorry.rpc.errors import LorryError
from lorry.rpc.histogram import SECONDS, Histogram
from lorry.worker.failures import to_error
from lorry.worker.messages import Finished, FinishReason, Submit


class RequestCounts:
    """Every Submit that is received ends in one outcome, or the engine still has it."""

    def __init__(self) -> None:
        self.received = 0
        self.ended: Counter[Outcome] = Counter()
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.prefill_s = Histogram(SECONDS)
        self.adapter_wait_s = Histogram(SECONDS)

    def refuse(self, error: LorryError) -> None:
        self.ended[Outcome.of(error)] += 1

    def pass_on(self, submit: Submit) -> None:
        self.prompt_tokens += len(submit.token_ids) - submit.generated_tokens

    def end(self, finished: Finished) -> None:
        self.ended[_outcome(finished)] += 1
        if finished.prefill_s:
            self.prefill_s.observe(finished.prefill_s)
        if finished.adapter_load_s:
            self.adapter_wait_s.observe(finished.adapter_load_s)


def _outcome(finished: Finished) -> Outcome:
    if finished.failure is not None:
        return Outcome.of(to_error(finished.failure))
    return CANCELLED if finished.reason is FinishReason.CANCELLED else OK
