"""The parsers of what strangers send; `python -m benchmarks.store_fuzz` tries 100,000."""

import json

from hypothesis import HealthCheck, given, settings

from tests.support.hostile_adapters import CONFIG, FILE, check_config, check_file, configs, files

QUICK = settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@QUICK
@given(files())
def test_any_file_is_good_or_refused(content: bytes) -> None:
    check_file(content)


@QUICK
@given(configs())
def test_any_config_is_good_or_refused(text: str) -> None:
    check_config(text)


def test_what_the_hostile_ones_are_made_from_is_good() -> None:
    assert check_file(FILE)
    assert check_config(json.dumps(CONFIG))
