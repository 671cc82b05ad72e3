import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.worker.plan import Batch
from lorry.worker.sequence_pages import SequencePages
from lorry.worker.sequences import SequenceTable
from tests.support.schedules import Driver

REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=12)


def apply(pages: SequencePages, batch: Batch, table: SequenceTable) -> int:
    """Write a batch's new pages; returns how many."""
    place, page = pages.changes(batch, table)
    pages.write(
        {"page_place": torch.from_numpy(place), "new_page": torch.from_numpy(page)}, len(page)
    )
    return len(page)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(18, 40), st.booleans())
def test_device_knows_every_page_that_a_step_reads(
    requests: list[tuple[int, int]], num_pages: int, prefix_cache: bool
) -> None:
    driver = Driver(pages=num_pages, prefix_cache=prefix_cache)
    table = driver.scheduler.table
    pages = SequencePages(*table.block_table_RP.shape, torch.device("cpu"))
    for number, (prompt, max_tokens) in enumerate(requests, start=1):
        driver.submit(number, prompt, max_tokens)

    def on_batch(batch: Batch) -> None:
        apply(pages, batch, table)
        check(pages, batch, table)

    driver.on_batch = on_batch
    driver.run()


def check(pages: SequencePages, batch: Batch, table: SequenceTable) -> None:
    for row in batch.row_S.tolist():
        count = table.num_pages_R[row]
        expected = table.block_table_RP[row, :count].tolist()
        assert pages.table_RP[row, :count].tolist() == expected


def test_only_new_pages_travel() -> None:
    driver = Driver()
    pages = SequencePages(*driver.scheduler.table.block_table_RP.shape, torch.device("cpu"))
    sent: list[int] = []
    driver.on_batch = lambda batch: sent.append(apply(pages, batch, driver.scheduler.table))
    driver.submit(1, prompt=10, max_tokens=8)
    driver.run()
    assert sent == [3, 0, 0, 1, 0, 0, 0, 1]


def test_what_does_not_fit_is_written_at_once() -> None:
    driver = Driver()
    table = driver.scheduler.table
    pages = SequencePages(*table.block_table_RP.shape, torch.device("cpu"))
    driver.on_batch = lambda batch: pages.write_now(*pages.changes(batch, table))
    driver.submit(1, prompt=16, max_tokens=1)
    driver.step()
    assert pages.table_RP[0, :4].tolist() == [1, 2, 3, 4]
