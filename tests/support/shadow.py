"""What the pool's pages hold, as far as a driver's launched steps tell."""

import numpy as np

from lorry.worker.plan import Batch
from tests.support.schedules import Driver


class ShadowPool:
    """Writes down whose KV each step puts where, and checks what the step reads before that.

    KV is a function of the version and all tokens so far; of the tenant too, so that a test finds
    pages that cross tenants.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._table = driver.scheduler.table
        self._content = dict[tuple[int, int], int]()  # by page and place in it
        self._drawn = dict[tuple[int, int], int]()  # by request and position
        self.num_computed = 0
        driver.on_batch = self.run
        driver.on_load = self.overwrite

    def overwrite(self, pages: list[int]) -> None:
        """An adapter was loaded there."""
        for page in pages:
            for place in range(self._table.page_tokens):
                self._content.pop((page, place), None)

    def run(self, batch: Batch) -> None:
        table = self._table
        ends = batch.start_S + batch.length_S
        for row, start, end in zip(batch.row_S, batch.start_S, ends, strict=True):
            wanted = self._contents(row, end)
            pages = table.block_table_RP[row].repeat(table.page_tokens).tolist()
            places = [(page, at % table.page_tokens) for at, page in enumerate(pages[:end])]
            for place, content in zip(places[start:], wanted[start:], strict=True):
                self._content[place] = content
            held = [self._content.get(place) for place in places]
            assert held == wanted, f"row {row} reads what is not its own"
        self.num_computed += batch.num_tokens
        sampled = batch.samples_S
        for row, end in zip(batch.row_S[sampled], ends[sampled], strict=True):
            self._drawn[int(table.number_R[row]), int(end)] = self._driver.next_token

    def _contents(self, row: np.intp, end: np.intp) -> list[int]:
        table = self._table
        request = table.requests[row]
        assert request is not None
        content, contents = hash((request.submit.tenant, request.version)), list[int]()
        for position in range(end):
            if position < table.num_read_R[row]:
                token_id = int(table.token_ids_RC[row, position])
            else:
                token_id = self._drawn[request.number, position]
            content = hash((content, token_id))
            contents.append(content)
        return contents
