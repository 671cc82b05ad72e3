from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.worker.pool import DUMMY_PAGE, PagePool, PageUse


def test_kv_comes_from_the_low_end_and_adapters_from_the_high_end() -> None:
    pool = PagePool(11)
    assert pool.allocate_kv(3) == [1, 2, 3]
    assert pool.allocate_adapter(4) == [7, 8, 9, 10]
    assert (pool.free, pool.kv, pool.adapter, pool.total) == (3, 3, 4, 10)


def test_adapter_takes_the_highest_run_that_is_long_enough() -> None:
    pool = PagePool(11)
    held = pool.allocate_kv(10)
    pool.release(page for page in held if page not in (4, 8))
    assert pool.allocate_adapter(3) == [5, 6, 7]


def test_adapter_takes_scattered_pages_when_there_is_no_run() -> None:
    pool = PagePool(11)
    pool.allocate_kv(10)
    pool.release([2, 4, 6, 8])
    assert pool.allocate_adapter(3) == [4, 6, 8]


def test_freeing_a_free_page_is_a_defect() -> None:
    pool = PagePool(4)
    pages = pool.allocate_kv(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="one is FREE"):
        pool.release(pages)


def test_integrity_finds_a_page_with_two_owners_and_one_with_none() -> None:
    pool = PagePool(6)
    pages = pool.allocate_kv(2)
    with pytest.raises(AssertionError, match="two owners"):
        pool.check_integrity({PageUse.KV: [*pages, pages[0]]})
    with pytest.raises(AssertionError, match="in use"):
        pool.check_integrity({PageUse.KV: pages[:1]})


@given(st.lists(st.tuples(st.sampled_from(["kv", "adapter", "free"]), st.integers(0, 12))))
def test_every_page_has_one_owner_after_any_history(history: list[tuple[str, int]]) -> None:
    pool = PagePool(17)
    held: dict[str, list[list[int]]] = {"kv": [], "adapter": []}
    for action, number in history:
        if action == "free":
            owners = held["kv"] + held["adapter"]
            if owners:
                pages = owners[number % len(owners)]
                pool.release(pages)
                pages.clear()
        elif 0 < number <= pool.free:
            allocate = pool.allocate_kv if action == "kv" else pool.allocate_adapter
            pages = allocate(number)
            assert len(set(pages)) == number
            assert DUMMY_PAGE not in pages
            held[action].append(pages)
        pool.check_integrity(
            {PageUse.KV: chain(*held["kv"]), PageUse.ADAPTER: chain(*held["adapter"])}
        )
