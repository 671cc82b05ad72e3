"""Proof that all pages, references and users add up; see Scheduler.check_integrity."""

from collections.abc import Sequence

from lorry.worker.pool import PagePool, PageUse
from lorry.worker.prefix_cache import PrefixCache
from lorry.worker.request import Request
from lorry.worker.residency import Residency
from lorry.worker.sequences import SequenceTable


def check_integrity(
    running: Sequence[Request],
    table: SequenceTable,
    pool: PagePool,
    prefixes: PrefixCache,
    residency: Residency,
) -> None:
    """Raise AssertionError unless every page has its owner, and every reference its user."""
    pages = [page for request in running for page in table.pages(request.row)]
    own = [page for page in pages if page not in prefixes.pages]
    adapter_pages = [page for adapter in residency for page in adapter.pages]
    pool.check_integrity(
        {PageUse.KV: own, PageUse.PREFIX: prefixes.pages, PageUse.ADAPTER: adapter_pages}
    )
    prefixes.check_integrity(page for page in pages if page in prefixes.pages)
    residency.check_integrity()
    for adapter in residency:
        users = sum(request.version == adapter.version for request in running)
        assert adapter.references == users, f"{adapter.references} references, {users} users"
    for request in running:
        _check_keys(request, table, prefixes)


def _check_keys(request: Request, table: SequenceTable, prefixes: PrefixCache) -> None:
    """Every cached page that the sequence uses holds what the sequence has there."""
    token_ids, page_tokens = table.token_ids_RC[request.row], table.page_tokens
    assert table.num_done_R[request.row] <= table.num_read_R[request.row]
    for index, page in enumerate(table.pages(request.row)):
        if (key := prefixes.key_of(page)) is not None:
            is_own = key == request.page_keys.at(index, token_ids, page_tokens)
            assert is_own, f"page {page} is another prefix's"
