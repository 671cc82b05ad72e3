"""The table of errors in docs/faults.md."""

import pytest

from deploy.errors_table import meaning, parts, table
from lorry.rpc.errors import ERRORS, LorryError

CLASSES = sorted(ERRORS.values(), key=lambda error: error.__name__)


def test_the_page_has_the_table_of_the_classes() -> None:
    _, between, _ = parts()
    assert between == table(), "run `make docs`"


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_has_a_meaning_that_fits_a_cell(error: type[LorryError]) -> None:
    assert meaning(error)
    assert "|" not in meaning(error)
