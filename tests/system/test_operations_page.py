"""docs/operations.md names tests that there are."""

import re

import pytest

from tests.support.command import REPO

PAGE = (REPO / "docs" / "operations.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_what_shows_a_promise_exists(file: str, test: str) -> None:
    source = (REPO / file).read_text()
    assert not test or f"def {test}(" in source
