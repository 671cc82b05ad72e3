"""What a LoRA adapter is once its config is resolved: rank and scale of each module and layer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorry.kernels.page_layout import MODULES, ModelGeometry

ATTENTION_MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
WEIGHTS_PREFIX = "base_model.model."  # peft's name of the model that it wraps


@dataclass(frozen=True, slots=True)
class ModuleLora:
    """One module in all layers. A layer without it has rank 0 and scale 0."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class LoraSpec:
    """The modules that an adapter has, in the order of `MODULES`."""

    modules: Mapping[str, ModuleLora]

    @cached_property
    def max_rank(self) -> int:
        return max(max(module.ranks) for module in self.modules.values())

    def parts(self) -> Iterator[tuple[int, str, int]]:
        """Layer, module and rank of everything that has weights, in canonical order."""
        for module, lora in self.modules.items():
            for layer, rank in enumerate(lora.ranks):
                if rank:
                    yield layer, module, rank

    def to_json(self) -> str:
        """Canonical: equal adapters give equal text."""
        modules = {m: {"ranks": v.ranks, "scales": v.scales} for m, v in self.modules.items()}
        return json.dumps({"method": "lora", "modules": modules}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "LoraSpec":
        modules: dict[str, Any] = json.loads(text)["modules"]
        return cls(
            {
                module: ModuleLora(
                    tuple(modules[module]["ranks"]), tuple(modules[module]["scales"])
                )
                for module in MODULES
                if module in modules
            }
        )


def module_path(layer: int, module: str) -> str:
    """The module's name inside the base model."""
    block = "self_attn" if module in ATTENTION_MODULES else "mlp"
    return f"model.layers.{layer}.{block}.{module}"


def tensor_names(layer: int, module: str) -> tuple[str, str]:
    """Names of A and B in a PEFT file."""
    path = WEIGHTS_PREFIX + module_path(layer, module)
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def tensor_shapes(geometry: ModelGeometry, module: str, rank: int) -> tuple[list[int], list[int]]:
    """Shapes of A and B in a PEFT file."""
    width_in, width_out = geometry.module_shape(module)
    return [rank, width_in], [width_out, rank]
