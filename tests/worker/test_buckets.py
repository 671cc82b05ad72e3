import pytest

from lorry.worker.buckets import bucket_of, bucket_sizes


def test_buckets_grow_coarser() -> None:
    sizes = bucket_sizes(1024)
    assert sizes[:6] == (1, 2, 4, 8, 16, 24)
    for start, end, spacing in [(8, 64, 8), (64, 256, 16), (256, 512, 32), (512, 1024, 64)]:
        within = [size for size in sizes if start <= size <= end]
        assert within == list(range(start, end + 1, spacing))


@pytest.mark.parametrize("largest", [1, 3, 8, 100, 512, 1000])
def test_largest_bucket_is_the_largest_step(largest: int) -> None:
    sizes = bucket_sizes(largest)
    assert sizes[-1] == largest
    assert list(sizes) == sorted(set(sizes))


def test_step_takes_the_smallest_bucket_that_holds_it() -> None:
    sizes = bucket_sizes(64)
    assert [bucket_of(size, sizes) for size in (1, 3, 8, 9, 57, 64)] == [1, 4, 8, 16, 64, 64]
