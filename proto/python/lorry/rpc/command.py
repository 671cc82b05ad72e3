"""What the command lines of all services share: one frozen config from flags and environment."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import cyclopts

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
Config = TypeVar("Config")


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what an extra of the distribution brings; if it is missing, say which one and exit."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "lorry":
            raise
        sys.exit(f"{error}. This command needs an extra: pip install 'lorry[{name}]'")


def check_positive(config: object, *fields: str) -> None:
    """Raise ValueError naming a field and its value that is not above 0; None is no value."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and not value > 0:
            raise ValueError(f"{field} must be positive, got {value}")


def check_not_negative(config: object, *fields: str) -> None:
    """Raise ValueError naming a field and its value that is below 0."""
    for field in fields:
        value = getattr(config, field)
        if not value >= 0:
            raise ValueError(f"{field} must not be negative, got {value}")


def run_service(
    config_type: type[Config], run: Callable[[Config], Any], *, name: str, help: str
) -> None:
    """Parse `config_type` from flags and ``LORRY_<NAME>_*`` variables, then call `run` with it.

    `config_type` is a frozen dataclass marked ``cyclopts.Parameter(name="*")``, whose attribute
    docstrings are the help. A ValueError of its checks ends the command with its text.
    """
    prefix = f"LORRY_{name.upper().replace('-', '_')}_"
    app = cyclopts.App(
        name=f"lorry.{name.replace('-', '_')}",
        help=help,
        version_flags=[],
        config=cyclopts.config.Env(prefix, command=False),
        result_action="return_value",
    )

    def command(config: Any) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
        run(config)

    command.__annotations__["config"] = config_type
    app.default(command)
    try:
        app(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"lorry.{name}: {error}")
