"""adapter_config.json of PEFT: which fields are understood, ignored or refused, and what they mean.

A field of a later or another PEFT that this module does not know is accepted only when it is off:
null, false or empty. So nothing that could change the result is ever overlooked.
"""

import math
from collections.abc import Mapping
from typing import Any

from lorry.adapter_store.lora import LoraSpec, ModuleLora, module_path
from lorry.adapter_store.peft_patterns import Patterns, TargetSelection
from lorry.adapter_store.strict_json import parse_object
from lorry.kernels.page_layout import MAX_RANK, MODULES, ModelGeometry
from lorry.rpc.errors import AdapterInvalid

MAX_CONFIG_BYTES = 64 << 10
UNDERSTOOD = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)
# Training and book-keeping, and the settings of initialisers, on which init_lora_weights decides.
IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
# Beside null, false and empty. The initialisers are those that leave the base model as it is.
ALLOWED: Mapping[str, frozenset[object]] = {
    "bias": frozenset({"none"}),
    "init_lora_weights": frozenset({True, "gaussian", "eva", "orthogonal"}),
    "task_type": frozenset({"CAUSAL_LM"}),
}


def parse_config(text: str) -> dict[str, Any]:
    """The fields of adapter_config.json."""
    if len(text.encode()) > MAX_CONFIG_BYTES:
        raise AdapterInvalid.of("config_json", f"is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return parse_object(text)
    except ValueError as error:
        raise AdapterInvalid.of("config_json", str(error)) from error


def resolve(config: Mapping[str, Any], geometry: ModelGeometry) -> LoraSpec:
    """What the config means for a base model; raises AdapterInvalid naming the field."""
    refuse_unsupported(config)
    selection = TargetSelection.of(config)
    ranks, alphas = Patterns.of(config, "rank_pattern"), Patterns.of(config, "alpha_pattern")
    rank, alpha = _rank("r", config.get("r")), _number("lora_alpha", config.get("lora_alpha"))
    rslora = _flag(config, "use_rslora")
    selection.refuse_unservable(geometry.layers)

    def resolve_one(path: str) -> tuple[int, float]:
        if not selection.matches(path):
            return 0, 0.0
        own_rank = _rank(*(ranks.find(path) or ("r", rank)), most=MAX_RANK)
        own_alpha = _number(*(alphas.find(path) or ("lora_alpha", alpha)))
        return own_rank, own_alpha / (math.sqrt(own_rank) if rslora else own_rank)

    modules = {}
    for module in MODULES:
        found = [resolve_one(module_path(layer, module)) for layer in range(geometry.layers)]
        if any(rank for rank, _ in found):
            modules[module] = ModuleLora(*(tuple(column) for column in zip(*found, strict=True)))
    if not modules:
        raise AdapterInvalid.of("target_modules", "matches no module of the base model")
    return LoraSpec(modules)


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Name a field that would change the result and is not supported."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterInvalid.of("peft_type", f"must be 'LORA', got {_shown(kind)}")
    for field, value in sorted(config.items()):
        if field in UNDERSTOOD or field in IGNORED or _is_off(value):
            continue
        if not isinstance(value, list | dict) and value in ALLOWED.get(field, ()):
            continue
        raise AdapterInvalid.of(field[:200], f"{_shown(value)} is not supported")


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise AdapterInvalid.of(field, f"must be true or false, got {_shown(value)}")
    return value


def _rank(field: str, value: object, *, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterInvalid.of(field, f"must be a positive integer, got {_shown(value)}")
    if most is not None and value > most:
        raise AdapterInvalid.of(field, f"must be in [1, {most}], got {_shown(value)}")
    return value


def _number(field: str, value: object) -> float:
    """A scale that fp32 holds."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise AdapterInvalid.of(field, f"must be a number below 1e30, got {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    return repr(value)[:200]
