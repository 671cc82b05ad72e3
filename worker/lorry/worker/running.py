"""The requests that have a row of the sequence table and pages, from their first chunk on."""

import bisect

import numpy as np

from lorry.kernels.page_layout import BASE_MODEL
from lorry.worker.page_sharing import PageSharing
from lorry.worker.plan import BatchBuilder
from lorry.worker.pool import PagePool
from lorry.worker.request import Request, RequestState
from lorry.worker.residency import Residency
from lorry.worker.sequences import SequenceTable
from lorry.worker.waiting import number_of


class RunningRequests:
    """Each also holds a reference to its adapter."""

    def __init__(
        self, table: SequenceTable, pool: PagePool, residency: Residency, sharing: PageSharing
    ) -> None:
        self._table = table
        self._pool = pool
        self._residency = residency
        self._sharing = sharing
        self._prefilling: list[Request] = []  # by number

    def start(self, request: Request, rows: BatchBuilder, cached: list[int], now_s: float) -> None:
        """Plan the first chunk of a request; there is room for its pages beside `cached`."""
        slot = BASE_MODEL
        if adapter := self._residency.find(request.version):
            self._residency.acquire(adapter)
            slot = adapter.slot
            if request.prefill_started_s is None:
                request.adapter_load_s = max(0.0, adapter.resident_since_s - request.arrival_s)
        if request.prefill_started_s is None:
            request.prefill_started_s = now_s
        request.move_to(RequestState.PREFILL)
        bisect.insort(self._prefilling, request, key=number_of)
        self._table.add(request, slot, cached)
        pages = self._table.pages_short(request.row, len(request.token_ids))
        self._table.append_pages(request.row, self._pool.allocate_kv(pages))
        self._compute_chunk(request, rows)

    def continue_prompts(self, rows: BatchBuilder) -> None:
        """Plan the next chunks, oldest request first."""
        for request in list(self._prefilling):
            if rows.left:
                self._compute_chunk(request, rows)

    def leave(self, request: Request, step: int) -> None:
        """Give back its row, its pages and its adapter; the caller moves it on."""
        if request.state is RequestState.PREFILL:
            self._prefilling.remove(request)
        self._sharing.leave(request, step)
        if adapter := self._residency.find(request.version):
            self._residency.release(adapter)

    def at(self, row: int) -> Request:
        request = self._table.requests[row]
        assert request is not None, f"row {row} is free"
        return request

    def newest(self) -> Request:
        running = (request for request in self._table.requests if request is not None)
        return max(running, key=number_of)

    def decoding_rows(self) -> np.ndarray:
        """Rows of those that can draw another token, whatever the steps under way draw."""
        table = self._table
        return np.flatnonzero(table.is_decoding_R & (table.num_tokens_R < table.most_tokens_R))

    def note_first_tokens(self, rows: np.ndarray, now_s: float) -> None:
        """A token of each row was read."""
        first = rows[self._table.awaits_first_R[rows]]
        self._table.awaits_first_R[first] = False
        for row in first.tolist():
            request = self.at(row)
            if request.prefill_started_s is not None and not request.prefill_s:
                request.prefill_s = now_s - request.prefill_started_s

    def _compute_chunk(self, request: Request, rows: BatchBuilder) -> None:
        """Plan as much of the known tokens as the step has room for; the last chunk samples."""
        if rows.add_chunk(request.row):
            request.move_to(RequestState.DECODE)
            self._prefilling.remove(request)
