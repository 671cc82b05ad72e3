"""What start-up logs of its progress."""

import logging

import pytest

from lorry.worker import progress
from lorry.worker.progress import counted, logged

log = logging.getLogger(__name__)


def texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().rsplit(" ", 2)[0] for record in caplog.records]


def test_the_end_is_logged_with_the_number_of_items(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(counted(log, "abc", "wrote letters")) == ["a", "b", "c"]
    assert texts(caplog) == ["wrote letters: 3 in"]


def test_a_long_way_is_logged_every_few_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PROGRESS_S", 0.0)
    caplog.set_level(logging.INFO)
    list(counted(log, "ab", "wrote letters"))
    done = ["wrote letters: 0 of 2,", "wrote letters: 1 of 2,", "wrote letters: 2 in"]
    assert texts(caplog) == done


def test_what_fails_is_not_logged_as_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ZeroDivisionError), logged(log, "divided"):
        raise ZeroDivisionError
    with logged(log, "rested"):
        pass
    assert texts(caplog) == ["rested in"]
