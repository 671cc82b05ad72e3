"""Fields of a model's config.json, checked as they are read."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"


class UnsupportedModel(ValueError):
    """The directory holds no base model that can be served."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A JSON object's fields; every reader raises UnsupportedModel that names field and value."""

    fields: Mapping[str, Any]
    prefix: str = ""  # of the fields' names, for messages

    def over(self, defaults: Mapping[str, Any]) -> "ModelConfig":
        """The same fields, and `defaults` where they are absent; an explicit null is a value."""
        return ModelConfig({**defaults, **self.fields}, self.prefix)

    def get(self, name: str) -> Any:
        """None where the field is absent."""
        return self.fields.get(name)

    def count(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(name, "must be a positive integer")
        return value

    def count_or_none(self, name: str) -> int | None:
        return None if self.get(name) is None else self.count(name)

    def positive(self, name: str) -> float:
        value = self.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise self.refused(name, "must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """False where the field is absent or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refused(name, "must be true or false")
        return bool(value)

    def require(self, name: str, supported: tuple[Any, ...]) -> None:
        """Refuse any other value than those of `supported`."""
        if self.get(name) not in supported:
            raise self.refused(name, "is not supported")

    def refused(self, name: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{CONFIG_FILE}: {self.prefix}{name} {self.get(name)!r} {why}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises UnsupportedModel that names the file."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UnsupportedModel(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path}: must hold a JSON object")
    return content
