import importlib
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import cyclopts
import pytest

from lorry.rpc.command import check_not_negative, check_positive, extra, run_service


@cyclopts.Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Config:
    """A service's."""

    model: str
    """Directory of the base model."""

    worker: tuple[str, ...] = ()
    """HOST:PORT of a worker; may be repeated."""

    grace_s: float = 5.0
    """Seconds to drain."""

    def __post_init__(self) -> None:
        check_not_negative(self, "grace_s")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Config]:
    """What the service is run with."""
    configs: list[Config] = []
    monkeypatch.setattr(sys, "argv", ["lorry.tiny_service", "--model", "m", *arguments])
    run_service(Config, configs.append, name="tiny-service", help="A service.")
    return configs


def test_defaults_hold_unless_something_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch) == [Config(model="m")]


def test_flags_become_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = run(monkeypatch, "--worker", "a:1", "--worker", "b:2", "--grace-s", "0.5")
    assert configs == [Config(model="m", worker=("a:1", "b:2"), grace_s=0.5)]


def test_variables_become_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_TINY_SERVICE_GRACE_S", "2.5")
    assert run(monkeypatch) == [Config(model="m", grace_s=2.5)]


def test_a_flag_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_TINY_SERVICE_GRACE_S", "2.5")
    assert run(monkeypatch, "--grace-s", "1") == [Config(model="m", grace_s=1)]


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_value_that_must_be_positive_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=f"grace_s must be positive, got {value}"):
        check_positive(SimpleNamespace(port=1, grace_s=value), "port", "grace_s")


def test_an_unset_value_is_no_wrong_value() -> None:
    check_positive(SimpleNamespace(grace_s=None), "grace_s")


def test_a_refused_value_ends_the_command_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="grace_s must not be negative, got -1"):
        run(monkeypatch, "--grace-s=-1")


def test_a_value_error_of_the_service_ends_the_command_with_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: Config) -> None:
        raise ValueError(f"{config.model!r} is not there")

    monkeypatch.setattr(sys, "argv", ["lorry.tiny_service", "--model", "m"])
    with pytest.raises(SystemExit, match=r"lorry\.tiny-service: 'm' is not there"):
        run_service(Config, fail, name="tiny-service", help="A service.")


def test_a_missing_option_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorry.tiny_service"])
    with pytest.raises(SystemExit) as ended:
        run_service(Config, print, name="tiny-service", help="A service.")
    assert ended.value.code != 0
    assert "--model" in "".join(capsys.readouterr())


def test_an_unknown_option_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--graces", "1")
    assert ended.value.code != 0
    assert "--graces" in "".join(capsys.readouterr())


def test_help_has_every_option_with_unit_default_and_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--grace-s" in text
    assert "Seconds to drain." in text
    assert "[default: 5.0]" in text
    assert "LORRY_TINY_SERVICE_GRACE_S" in text


def test_a_missing_extra_is_named() -> None:
    match = r"no_such_library.*pip install 'lorry\[worker\]'"
    with pytest.raises(SystemExit, match=match), extra("worker"):
        importlib.import_module("no_such_library")


def test_a_missing_module_of_our_own_is_a_defect() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"lorry\.no_such_module"), extra("worker"):
        importlib.import_module("lorry.no_such_module")
