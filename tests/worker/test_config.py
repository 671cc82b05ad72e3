import sys

import pytest

from lorry.rpc.command import run_service
from lorry.worker.config import Config


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    configs: list[Config] = []
    monkeypatch.setattr(sys, "argv", ["lorry.worker", "--model", "m", *arguments])
    run_service(Config, configs.append, name="worker", help="")
    (config,) = configs
    return config


@pytest.mark.parametrize("field", ["one_shot_sums", "prefix_cache"])
def test_what_is_on_by_default_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    assert getattr(parsed(monkeypatch), field)
    assert not getattr(parsed(monkeypatch, f"--no-{field.replace('_', '-')}"), field)
