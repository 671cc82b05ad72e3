"""A CRC-32C joined from those of parts is that of the whole."""

import numpy as np
import pytest
from crc32c import crc32c

from lorry.adapter_store.combined_crc import CombinedCrc


@pytest.mark.parametrize("part_bytes", [1, 7, 4096])
@pytest.mark.parametrize("num_parts", [0, 1, 2, 33])
def test_the_crc_of_parts_is_that_of_the_whole(part_bytes: int, num_parts: int) -> None:
    whole = np.random.default_rng(part_bytes).bytes(part_bytes * num_parts)
    parts = [whole[first : first + part_bytes] for first in range(0, len(whole), part_bytes)]
    assert CombinedCrc(part_bytes).join(map(crc32c, parts)) == crc32c(whole)
