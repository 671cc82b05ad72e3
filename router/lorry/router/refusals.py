"""Why a request is refused: nobody can serve it, or not in time."""

from collections.abc import Iterable

from lorry.router.actions import Abort
from lorry.router.context_length import context_exceeded
from lorry.router.places import RETRY_AFTER_S
from lorry.router.request import Request
from lorry.router.worker import Worker
from lorry.rpc.errors import (
    AdapterIncompatible,
    ContextLengthExceeded,
    NoWorker,
    SloUnattainable,
)


def no_worker() -> NoWorker:
    return NoWorker("no worker is attached", retry_after_s=RETRY_AFTER_S)


def unable(
    request: Request, workers: Iterable[Worker]
) -> AdapterIncompatible | ContextLengthExceeded | NoWorker:
    """Why none of `workers` could ever serve it."""
    ready = [worker for worker in workers if worker.accepting]
    if not ready:
        return no_worker()
    max_rank = max(worker.max_rank for worker in ready)
    if request.rank > max_rank:
        return AdapterIncompatible(
            f"adapter {request.generation.adapter} has rank {request.rank}; "
            f"the workers serve at most {max_rank}",
            rank=request.rank,
            maxRank=max_rank,
        )
    able = [worker for worker in ready if worker.max_rank >= request.rank]
    return context_exceeded(
        "stopping.max_tokens",
        len(request.prompt_ids),
        request.max_tokens,
        max(worker.max_context_tokens for worker in able),
    )


def slo_unattainable(abort: Abort) -> SloUnattainable:
    slo = abort.request.slo
    if abort.tpot_s is not None:
        assert slo.tpot_s is not None, "aborted for an objective that it has not"
        return SloUnattainable(
            f"a token would come every {abort.tpot_s:.4f} s, the request asks for {slo.tpot_s:g}",
            retry_after_s=RETRY_AFTER_S,
            predictedTpotS=f"{abort.tpot_s:.4f}",
            askedTpotS=f"{slo.tpot_s:g}",
        )
    assert slo.ttft_s is not None, "aborted without an objective"
    return SloUnattainable(
        f"the first token would come after {abort.ttft_s:.3f} s, "
        f"the request asks for {slo.ttft_s:g}",
        retry_after_s=max(RETRY_AFTER_S, abort.ttft_s - slo.ttft_s),
        predictedTtftS=f"{abort.ttft_s:.3f}",
        askedTtftS=f"{slo.ttft_s:g}",
    )
