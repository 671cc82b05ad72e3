"""Whether a request can ever be served by this engine."""

from lorry.worker.messages import Failure
from lorry.worker.pool import PagePool
from lorry.worker.request import Request
from lorry.worker.residency import Residency


def refusal(
    request: Request,
    max_context_tokens: int,
    pool: PagePool,
    residency: Residency,
    page_tokens: int,
) -> Failure | None:
    """Why `request` can never run, None if it can.

    Pages of its adapter count once its image has told them. Whatever fits beside the pinned
    adapters fits in the end, since everything else can be evicted or preempted.
    """
    if request.most_tokens > max_context_tokens:
        return Failure(
            "CONTEXT_LENGTH_EXCEEDED",
            f"prompt ({request.prompt_tokens}) and max_tokens ({request.submit.max_tokens}) "
            f"exceed the context of {max_context_tokens} tokens",
        )
    adapter = residency.find(request.version)
    own_pages = adapter.num_pages if adapter else 0
    pinned = residency.pinned_pages - (own_pages if adapter and adapter.pinned else 0)
    needed = own_pages + -(-request.most_tokens // page_tokens)
    if needed + pinned > pool.total:
        return Failure(
            "POOL_TOO_SMALL",
            f"adapter ({own_pages} pages), prompt and max_tokens need {needed} pages "
            f"of {pool.total}, of which {pinned} are pinned",
        )
    return None
