import itertools

import numpy as np
import pytest

from lorry.worker.page_keys import PageKeys

TOKENS = np.arange(12, dtype=np.int32)
VERSION = bytes(range(32))


def keys_of(tenant: str, version: bytes, token_ids: np.ndarray = TOKENS) -> list[bytes]:
    keys = PageKeys(tenant, version)
    return [keys.at(index, token_ids, 4) for index in range(3)]


def test_a_page_has_the_same_key_whenever_it_is_asked_for() -> None:
    keys = PageKeys("t", VERSION)
    assert keys.at(2, TOKENS, 4) == keys_of("t", VERSION)[2]
    assert keys.at(0, TOKENS, 4) == keys_of("t", VERSION)[0]


def test_keys_differ_by_tenant_version_and_place() -> None:
    names = [("t", b""), ("u", b""), ("t", VERSION), ("t", bytes(32)), ("", b"t")]
    # Without the tenant's length these two would be one.
    names += [("ab" + "\0" * 32, b""), ("ab", bytes(32))]
    keys = list(itertools.chain(*(keys_of(*name) for name in names)))
    assert len(set(keys)) == len(keys) == 3 * len(names)


@pytest.mark.parametrize("changed", range(12))
def test_a_token_changes_the_keys_of_its_page_and_of_all_after_it(changed: int) -> None:
    token_ids = TOKENS.copy()
    token_ids[changed] = 99
    same = [a == b for a, b in zip(keys_of("t", b""), keys_of("t", b"", token_ids), strict=True)]
    assert same == [index < changed // 4 for index in range(3)]


def test_a_page_that_is_not_full_has_no_key() -> None:
    with pytest.raises(AssertionError, match="page 2 is not full"):
        PageKeys("t", b"").at(2, TOKENS[:11], 4)
