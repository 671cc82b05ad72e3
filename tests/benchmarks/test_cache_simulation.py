import random

from benchmarks.cache_simulation import belady_hits, lru_hits

SIZES = {0: 1, 1: 1, 2: 1, 3: 3}


def test_what_was_used_longest_ago_goes_first() -> None:
    assert lru_hits([0, 1, 0, 2, 0, 1], SIZES, 2) == 2
    assert lru_hits([0, 1, 2, 3, 0, 1, 2], SIZES, 3) == 0  # a large item takes the place of three


def test_what_is_used_again_last_goes_first() -> None:
    assert belady_hits([0, 1, 2, 0, 1, 2], SIZES, 2) == 2
    assert lru_hits([0, 1, 2, 0, 1, 2], SIZES, 2) == 0


def test_knowing_the_future_of_items_of_one_size_is_never_worse() -> None:
    draw = random.Random(7)
    sizes = dict.fromkeys(range(30), 1)
    for budget in (1, 3, 10, 30):
        trace = [min(draw.randrange(30), draw.randrange(30)) for _ in range(500)]
        assert belady_hits(trace, sizes, budget) >= lru_hits(trace, sizes, budget)
    assert belady_hits(trace, sizes, 30) == lru_hits(trace, sizes, 30) == 500 - len(set(trace))
