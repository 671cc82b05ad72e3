"""Between sequences and the prefix cache: what a request borrows, and what it offers in return."""

import numpy as np

from lorry.worker.plan import Batch
from lorry.worker.prefix_cache import PrefixCache
from lorry.worker.request import Request
from lorry.worker.room import Room
from lorry.worker.sequences import SequenceTable

# Of all sequences after a step; the next steps offer the others. At 512 sequences 32 fill in one.
MAX_OFFERED_PAGES = 128


class PageSharing:
    """Does nothing unless `is_on`."""

    def __init__(self, table: SequenceTable, prefixes: PrefixCache, *, is_on: bool) -> None:
        self._table = table
        self._prefixes = prefixes
        self._is_on = is_on

    def borrow(self, request: Request, room: Room, *, watermark: int) -> list[int] | None:
        """Take the cached pages that `request` begins with, once there is room for its others.

        Room is made for those, and for `watermark` more.
        """
        pages = -(-len(request.token_ids) // self._table.page_tokens) + watermark
        if not room.can_make(pages - self._most_cached(request)):
            return None
        cached = self._cached(request)
        if not room.make(pages - len(cached), keep=cached):
            return None
        self._prefixes.acquire(cached)
        if self._is_looked_up(request) and request.prefill_started_s is None:
            num_cached = len(cached) * self._table.page_tokens
            self._prefixes.note_query(len(request.token_ids), num_cached)
            request.cached_tokens = min(num_cached, request.prompt_tokens)
        return cached

    def note_done(self, batch: Batch, alive_S: np.ndarray) -> None:
        """A step's results are read: offer the pages that are full now to the cache."""
        if not self._is_on:
            return
        table, rows = self._table, batch.row_S[alive_S]
        table.num_done_R[rows] = (batch.start_S + batch.length_S)[alive_S]
        offered, full_R = list[tuple[bytes, int]](), table.num_done_R // table.page_tokens
        for row in np.flatnonzero(full_R > table.num_offered_R).tolist():
            offered += self._offer(row, most=MAX_OFFERED_PAGES - len(offered))
            if len(offered) == MAX_OFFERED_PAGES:
                break
        self._prefixes.enter(offered)

    def leave(self, request: Request, step: int) -> None:
        """Take `request` from its row; full pages stay in the cache, the others are free."""
        if self._is_on:
            num_pages = int(self._table.num_pages_R[request.row])
            self._prefixes.enter(self._offer(request.row, most=num_pages))
        self._prefixes.release(self._table.remove(request), step)

    def _is_looked_up(self, request: Request) -> bool:
        return self._is_on and request.submit.prompt_logprobs is None  # for which all is computed

    def _most_cached(self, request: Request) -> int:
        """Cached pages that `request` may begin with, at most; quicker to know than which.

        Where the last look ended, the next one ends too as long as that page is missing.
        """
        if not self._is_looked_up(request):
            return 0
        most, end = (len(request.token_ids) - 1) // self._prefixes.page_tokens, request.cached_pages
        if end is None or end >= most:
            return most
        return most if self._key(request, end, request.token_ids) in self._prefixes else end

    def _cached(self, request: Request) -> list[int]:
        if not self._is_looked_up(request):
            return []
        cached = self._prefixes.match(request.page_keys, request.token_ids)
        request.cached_pages = len(cached)
        return cached

    def _offer(self, row: int, *, most: int) -> list[tuple[bytes, int]]:
        """Up to `most` of the row's full pages that were not offered yet, with their keys."""
        table = self._table
        request, first = table.requests[row], int(table.num_offered_R[row])
        assert request is not None, f"row {row} is free"
        end = min(int(table.num_done_R[row]) // table.page_tokens, first + most)
        table.num_offered_R[row] = end
        token_ids, pages = table.token_ids_RC[row], table.block_table_RP[row, first:end].tolist()
        return [
            (self._key(request, index, token_ids), page)
            for index, page in enumerate(pages, start=first)
        ]

    def _key(self, request: Request, index: int, token_ids: np.ndarray) -> bytes:
        return request.page_keys.at(index, token_ids, self._table.page_tokens)
