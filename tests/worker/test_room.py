import pytest

from lorry.worker.messages import ImageReady
from lorry.worker.plan import Plan
from lorry.worker.pool import PagePool
from lorry.worker.prefix_cache import PrefixCache
from lorry.worker.residency import Adapter, Residency
from lorry.worker.room import ADAPTER_WITH_IMAGE_US, ADAPTER_WITHOUT_IMAGE_US, PREFIX_US, Room

PREFIX_TO_ADAPTER = PREFIX_US / ADAPTER_WITH_IMAGE_US
ADAPTER_TO_PREFIX = ADAPTER_WITHOUT_IMAGE_US / PREFIX_US


class Books:
    """A pool of 12 pages and its owners."""

    def __init__(self) -> None:
        self.pool = PagePool(13)
        self.residency = Residency(self.pool)
        self.prefixes = PrefixCache(self.pool, page_tokens=4)
        self.plan = Plan()

    def room(self, step: int) -> Room:
        return Room(self.pool, self.residency, self.prefixes, self.plan, step)

    def add_adapter(self, version: bytes, pages: int, last_used_step: int) -> Adapter:
        adapter = self.residency.begin_fetch(version)
        self.residency.finish_fetch(adapter, ImageReady(version, "", 0, 0, pages, 8, []))
        self.residency.begin_load(adapter)
        self.residency.begin_step(last_used_step)
        self.residency.finish_load(adapter, now_s=0.0)
        return adapter

    def add_prefix(self, number: int, pages: int, last_used_step: int) -> list[int]:
        owned = self.pool.allocate_kv(pages)
        self.prefixes.enter([(b"%d-%d" % (number, page), page) for page in owned])
        self.prefixes.release(owned, last_used_step)
        return owned


@pytest.fixture
def books() -> Books:
    return Books()


def test_free_pages_are_taken_first(books: Books) -> None:
    books.add_prefix(1, 3, last_used_step=0)
    assert books.room(9).make(9)
    assert books.prefixes.evictions == 0


@pytest.mark.parametrize(("times_older", "goes"), [(1.1, "prefix"), (0.9, "adapter")])
def test_a_prefix_outlives_an_adapter_as_far_as_it_costs_more(
    books: Books, times_older: float, goes: str
) -> None:
    books.add_adapter(b"a", 4, last_used_step=990)
    books.add_prefix(1, 8, last_used_step=round(1000 - PREFIX_TO_ADAPTER * times_older * 10))
    assert books.room(1000).make(2)
    assert books.plan.evicted == ([b"a"] if goes == "adapter" else [])
    assert books.prefixes.evictions == (0 if goes == "adapter" else 2)


@pytest.mark.parametrize(("times_older", "goes"), [(1.1, "adapter"), (0.9, "prefix")])
def test_an_adapter_without_an_image_outlives_a_prefix(
    books: Books, times_older: float, goes: str
) -> None:
    adapter = books.add_adapter(
        b"a", 4, last_used_step=round(1000 - ADAPTER_TO_PREFIX * times_older * 10)
    )
    books.residency.drop_image(adapter)
    books.add_prefix(1, 8, last_used_step=990)
    assert books.room(1000).make(2)
    assert books.plan.evicted == ([b"a"] if goes == "adapter" else [])


def test_what_is_longest_idle_goes_first_and_a_chains_end_before_its_beginning(
    books: Books,
) -> None:
    old = books.add_prefix(1, 4, last_used_step=1)
    new = books.add_prefix(2, 4, last_used_step=2)
    books.room(9).make(4 + 3)
    assert set(books.prefixes.pages) == {old[0], *new}
    books.room(9).make(4 + 6)
    assert set(books.prefixes.pages) == set(new[:2])


def test_what_is_in_use_kept_or_protected_stays(books: Books) -> None:
    used, kept = (books.add_prefix(number, 2, last_used_step=0) for number in (1, 2))
    books.prefixes.acquire(used)
    books.add_adapter(b"a", 2, last_used_step=0)
    books.add_adapter(b"b", 2, last_used_step=0)
    books.residency.protect(b"a")
    room = books.room(9)
    assert not room.can_make(7, keep=kept)
    assert not room.make(7, keep=kept)
    assert books.pool.free == 4
    assert room.make(6, keep=kept)
    assert books.plan.evicted == [b"b"]
    assert set(books.prefixes.pages) == {*used, *kept}
    books.prefixes.check_integrity(used)
    books.residency.check_integrity()


def test_protection_ends_with_the_step(books: Books) -> None:
    books.add_adapter(b"a", 12, last_used_step=0)
    books.residency.protect(b"a")
    assert not books.room(1).can_make(1)
    books.residency.begin_step(1)
    assert books.room(1).make(1)


def test_integrity_finds_an_evicted_page_in_use_and_a_wrong_count(books: Books) -> None:
    pages = books.add_prefix(1, 2, last_used_step=0)
    books.prefixes.check_integrity([])
    with pytest.raises(AssertionError, match="has 1 users, counted 0"):
        books.prefixes.check_integrity(pages[:1])
    books.room(1).make(12)
    with pytest.raises(AssertionError, match="a page in use was evicted"):
        books.prefixes.check_integrity(pages[:1])
