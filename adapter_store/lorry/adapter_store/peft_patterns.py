"""Which modules a PEFT config targets, and which rank and alpha each gets.

Names are matched as peft does: a string is a regular expression for the whole name, a list holds
whole names or their last parts, and the keys of rank_pattern and alpha_pattern are regular
expressions for the last parts, of which the first that matches counts.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorry.adapter_store.lora import module_path
from lorry.kernels.page_layout import MODULES
from lorry.rpc.errors import AdapterInvalid

ALL_LINEAR = "all-linear"
ANY_LAYER_LIST = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
HEAD = "lm_head"
# The model's other modules: a config that targets one of them cannot be served.
OUTSIDE_LAYERS = ("model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb")
IN_A_LAYER = (
    "",
    ".self_attn",
    ".mlp",
    ".mlp.act_fn",
    ".input_layernorm",
    ".post_attention_layernorm",
)

Names = re.Pattern[str] | frozenset[str]


@dataclass(frozen=True)
class TargetSelection:
    """The fields of a config that select modules."""

    targets: Names
    excluded: Names
    layers: frozenset[int] | None  # None: all
    layer_index: tuple[re.Pattern[str], ...]  # finds the layer of a module; the first match counts
    all_linear: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TargetSelection":
        targets = config.get("target_modules")
        if not targets:
            raise AdapterInvalid.of("target_modules", f"must not be empty, got {targets!r}")
        layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
        _refuse_contradiction(targets, layers, pattern)
        return cls(
            targets=_names("target_modules", targets),
            excluded=_names("exclude_modules", config.get("exclude_modules") or []),
            layers=_layers(layers),
            layer_index=_layer_index(pattern),
            all_linear=isinstance(targets, str) and targets.lower() == ALL_LINEAR,
        )

    def matches(self, path: str) -> bool:
        """Whether the config targets the module of this name."""
        if _matches(self.excluded, path):
            return False
        if self.all_linear:
            return path.rpartition(".")[2] in MODULES
        if not _matches(self.targets, path):
            return False
        in_full = isinstance(self.targets, frozenset) and path in self.targets
        return in_full or self.layers is None or self._layer_of(path) in self.layers

    def refuse_unservable(self, num_layers: int) -> None:
        """Name a targeted module that is none of `MODULES`."""
        for path in _other_modules(num_layers):
            if self.matches(path):
                raise AdapterInvalid.of(
                    "target_modules", f"matches {path}, which cannot be adapted here"
                )

    def _layer_of(self, path: str) -> int | None:
        for pattern in self.layer_index:
            if match := pattern.match(path):
                return int(match["idx"])
        return None


@dataclass(frozen=True)
class Patterns:
    """rank_pattern or alpha_pattern."""

    field: str
    values: tuple[tuple[re.Pattern[str], str, object], ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], field: str) -> "Patterns":
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise AdapterInvalid.of(field, f"must be an object, got {patterns!r}"[:300])
        return cls(
            field,
            tuple(
                (_compiled(field, rf"(.*\.)?({key})$", shown=key), key, value)
                for key, value in patterns.items()
            ),
        )

    def find(self, path: str) -> tuple[str, object] | None:
        """The field and the value of the first pattern that matches."""
        for pattern, key, value in self.values:
            if pattern.match(path):
                return f"{self.field}.{key}"[:200], value
        return None


def _refuse_contradiction(targets: object, layers: object, pattern: object) -> None:
    """What peft refuses too."""
    for field, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
        if isinstance(targets, str) and value is not None:
            raise AdapterInvalid.of(field, "cannot be combined with target_modules as a string")
    if pattern and layers is None:
        raise AdapterInvalid.of("layers_pattern", "needs layers_to_transform")


def _names(field: str, value: object) -> Names:
    if isinstance(value, str):
        return _compiled(field, value, shown=value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    raise AdapterInvalid.of(field, f"must be a string or a list of strings, got {value!r}"[:300])


def _matches(names: Names, path: str) -> bool:
    if isinstance(names, re.Pattern):
        return names.fullmatch(path) is not None
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _layers(value: object) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    layers: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise AdapterInvalid.of(
            "layers_to_transform", f"must be an integer or a list of integers, got {value!r}"[:300]
        )
    return frozenset(layers)


def _layer_index(value: object) -> tuple[re.Pattern[str], ...]:
    if not value:
        return (ANY_LAYER_LIST,)
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise AdapterInvalid.of(
            "layers_pattern", f"must be a string or a list of strings, got {value!r}"[:300]
        )
    return tuple(
        _compiled("layers_pattern", rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", shown=p) for p in patterns
    )


def _compiled(field: str, pattern: str, *, shown: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterInvalid.of(field, f"{shown[:200]!r} is not a pattern: {error}") from error


def _other_modules(num_layers: int) -> Iterator[str]:
    yield from (*OUTSIDE_LAYERS, HEAD)
    for layer in range(num_layers):
        root = module_path(layer, MODULES[0]).rsplit(".", 2)[0]
        yield from (root + name for name in IN_A_LAYER)
