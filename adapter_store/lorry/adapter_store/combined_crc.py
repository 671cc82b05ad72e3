"""The CRC-32C of bytes from those of their parts."""

from collections.abc import Iterable
from functools import reduce
from operator import xor

from crc32c import crc32c

BITS, BYTE_BITS = 32, 8


class CombinedCrc:
    """Joins the CRC-32Cs of parts of one length.

    To read `part_bytes` more bytes moves a CRC on by a map that is linear over its bits and does
    not depend on them; what they are is added by their own CRC. The map is kept as its value for
    each value of each of a CRC's bytes.
    """

    def __init__(self, part_bytes: int) -> None:
        zeros = bytes(part_bytes)
        of_zeros = crc32c(zeros)
        moved = [crc32c(zeros, 1 << bit) ^ of_zeros for bit in range(BITS)]
        self._moved = [
            [_sum(moved[first : first + BYTE_BITS], value) for value in range(1 << BYTE_BITS)]
            for first in range(0, BITS, BYTE_BITS)
        ]

    def join(self, parts: Iterable[int]) -> int:
        """The CRC-32C of all parts, from each one's own in their order."""
        first, second, third, fourth = self._moved
        crc = 0
        for part in parts:
            moved = first[crc & 0xFF] ^ second[crc >> 8 & 0xFF]
            crc = part ^ moved ^ third[crc >> 16 & 0xFF] ^ fourth[crc >> 24]
        return crc


def _sum(moved: list[int], value: int) -> int:
    """What the bits of a byte become."""
    return reduce(xor, (each for bit, each in enumerate(moved) if value >> bit & 1), 0)
