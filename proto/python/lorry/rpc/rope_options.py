"""How far a model turns queries and keys at each position, as its config.json says.

`rope_scaling` is what older directories write, `rope_parameters` newer ones, whose fields are the
same and include `rope_theta`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorry.rpc.model_config import ModelConfig

DEFAULT_THETA = 10_000.0
COMMON_FIELDS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, those between them interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """A ramp over the dimensions from kept frequencies to divided ones (arXiv 2309.00071)."""

    factor: float
    original_context_tokens: int
    attention_factor: float  # of cosines and sines
    beta_fast: float
    beta_slow: float
    truncate: bool  # the ramp's ends to whole dimensions


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    theta: float
    scaling: Scaling | None = None

    def context_tokens(self, max_position_embeddings: int) -> int:
        """Positions that the model can use.

        `max_position_embeddings` counts none of the stretching by linear scaling or YaRN, as the
        models' documentation asks for; that of Llama 3.1 counts it.
        """
        match self.scaling:
            case LinearScaling(factor=factor):
                return int(factor * max_position_embeddings)
            case YarnScaling(factor=factor, original_context_tokens=original):
                return max(max_position_embeddings, int(factor * original))
        return max_position_embeddings


def read_rope(config: ModelConfig) -> Rope:
    """Raises UnsupportedModel that names an option that is not computed exactly."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    fields = config.get(name) or {}
    if not isinstance(fields, Mapping):
        raise config.refused(name, "must be an object")
    rope_type = fields.get("rope_type", fields.get("type", "default"))
    theta = config.get("rope_theta") or DEFAULT_THETA
    original = config.get("original_max_position_embeddings") or fields.get(
        "original_max_position_embeddings", config.get("max_position_embeddings")
    )
    rope = ModelConfig(
        {
            "rope_theta": theta,
            **fields,
            "rope_type": rope_type,
            "original_max_position_embeddings": original,
        },
        f"{name}.",
    )
    config.require("partial_rotary_factor", (None, 1))
    rope.require("partial_rotary_factor", (None, 1))
    rope.require("rope_type", tuple(SCALINGS))
    own_fields, scaling = SCALINGS[rope_type]
    for field in sorted(set(fields) - own_fields - COMMON_FIELDS):
        raise rope.refused(field, f"is not supported with rope_type {rope_type!r}")
    return Rope(theta=rope.positive("rope_theta"), scaling=scaling(rope))


def _linear(rope: ModelConfig) -> Scaling:
    return LinearScaling(factor=rope.positive("factor"))


def _llama3(rope: ModelConfig) -> Scaling:
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        raise rope.refused("high_freq_factor", f"must exceed low_freq_factor {low}")
    return Llama3Scaling(
        factor=rope.positive("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context_tokens=rope.count("original_max_position_embeddings"),
    )


def _yarn(rope: ModelConfig) -> Scaling:
    truncate = rope.get("truncate")
    factor = rope.positive("factor")
    return YarnScaling(
        factor=factor,
        original_context_tokens=rope.count("original_max_position_embeddings"),
        attention_factor=_attention_factor(rope, factor),
        beta_fast=rope.positive("beta_fast") if rope.get("beta_fast") else 32.0,
        beta_slow=rope.positive("beta_slow") if rope.get("beta_slow") else 1.0,
        truncate=True if truncate is None else rope.flag("truncate"),
    )


def _attention_factor(rope: ModelConfig, factor: float) -> float:
    """As the paper suggests it where the config does not say it."""
    if rope.get("attention_factor") is not None:
        return rope.positive("attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        numerator = _yarn_mscale(factor, rope.positive("mscale"))
        return numerator / _yarn_mscale(factor, rope.positive("mscale_all_dim"))
    return _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


# The fields of each type beside the common ones, and what reads them.
SCALINGS: Mapping[str, tuple[frozenset[str], Callable[[ModelConfig], Scaling | None]]] = {
    "default": (frozenset(), lambda rope: None),
    "linear": (frozenset({"factor"}), _linear),
    "llama3": (
        frozenset(
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        ),
        _llama3,
    ),
    "yarn": (
        frozenset(
            {
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
        _yarn,
    ),
}
