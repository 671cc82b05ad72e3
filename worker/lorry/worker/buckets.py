"""The sizes for which CUDA graphs are captured; a step is padded to the next one."""

from bisect import bisect_left
from collections.abc import Sequence

# Up to the first number, sizes are multiples of the second.
SPACING = ((8, 8), (64, 8), (256, 16), (512, 32))
COARSEST = 64


def bucket_sizes(largest: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8 to 64, every 16 to 256, every 32 to 512, every 64 up to `largest`."""
    sizes = [1, 2, 4]
    while sizes[-1] < largest:
        spacing = next((s for end, s in SPACING if sizes[-1] < end), COARSEST)
        sizes.append(sizes[-1] // spacing * spacing + spacing)
    return (*(size for size in sizes if size < largest), largest)


def bucket_of(size: int, sizes: Sequence[int]) -> int:
    """The smallest bucket that holds `size`, which must not exceed the largest."""
    return sizes[bisect_left(sizes, size)]
