"""The model families that are served, and in what their decoders differ.

All are Llama's decoder with a few options. A family says, by its architecture's name, what a
config.json of it leaves out and which options it has; any other option is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorry.kernels.page_layout import GROUPS, ModelGeometry
from lorry.rpc.model_config import ModelConfig, UnsupportedModel
from lorry.rpc.rope_options import Rope, read_rope

HEAD_DIMS = (16, 32, 64, 128)  # powers of two that the attention kernels take without spills
QKV, OUTPUT, GATE_UP, DOWN = GROUPS
ATTENTION, MLP = QKV + OUTPUT, GATE_UP + DOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOptions:
    """What a decoder computes that Llama's does not, or not so."""

    norm_epsilon: float
    rope: Rope
    # Of each layer, how many positions a row attends to, its own and those before it; None is all.
    windows: tuple[int | None, ...]
    biased: tuple[str, ...] = ()  # modules whose product a bias is added to
    qk_norm: bool = False  # RMS norm of each head of q and k before it is turned


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture, and how its config.json is read."""

    model_type: str
    defaults: Mapping[str, Any]  # of fields that a config.json may leave out
    supported: Mapping[str, tuple[Any, ...]]  # values of fields that would change what is computed
    biased: Callable[[ModelConfig], tuple[str, ...]] = field(default=lambda config: ())
    windows: Callable[[ModelConfig], list[int | None]]
    qk_norm: bool = False


def read_family(fields: Mapping[str, Any]) -> tuple[str, Family]:
    """The architecture that a config.json names; raises UnsupportedModel."""
    architecture = (fields.get("architectures") or ["none"])[0]
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModel(
            f"config.json: architecture {architecture!r} is not one of {sorted(FAMILIES)}"
        )
    return architecture, family


def read_geometry(config: ModelConfig) -> ModelGeometry:
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    head_dim = config.count_or_none("head_dim")
    if head_dim is None and hidden % heads:
        raise config.refused("hidden_size", f"is not a multiple of num_attention_heads {heads}")
    head_dim = head_dim or hidden // heads
    if head_dim not in HEAD_DIMS:
        raise UnsupportedModel(f"config.json: head_dim {head_dim} is not one of {HEAD_DIMS}")
    kv_heads = config.count_or_none("num_key_value_heads") or heads
    if heads % kv_heads:
        raise config.refused(
            "num_key_value_heads", f"does not divide the num_attention_heads {heads}"
        )
    return ModelGeometry(
        layers=config.count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=config.count("intermediate_size"),
    )


def read_options(config: ModelConfig, family: Family) -> DecoderOptions:
    """Raises UnsupportedModel that names an option that is not served, and its value."""
    for name, values in {**SUPPORTED, **family.supported}.items():
        config.require(name, values)
    rope = read_rope(config)
    context_tokens = rope.context_tokens(config.count("max_position_embeddings"))
    windows = family.windows(config)
    return DecoderOptions(
        norm_epsilon=config.positive("rms_norm_eps"),
        rope=rope,
        # A window that holds any context is none, and costs as little.
        windows=tuple(w if w is None or w < context_tokens else None for w in windows),
        biased=family.biased(config),
        qk_norm=family.qk_norm,
    )


def _llama_biases(config: ModelConfig) -> tuple[str, ...]:
    attention = ATTENTION if config.flag("attention_bias") else ()
    return attention + (MLP if config.flag("mlp_bias") else ())


def _no_windows(config: ModelConfig) -> list[int | None]:
    return [None] * config.count("num_hidden_layers")


def _one_window(config: ModelConfig) -> list[int | None]:
    return [config.count_or_none("sliding_window")] * config.count("num_hidden_layers")


def _windows_by_layer(config: ModelConfig) -> list[int | None]:
    """Of the layers that `layer_types` names, else of those from `max_window_layers` on."""
    slides = config.flag("use_sliding_window")
    window = config.count_or_none("sliding_window") if slides else None
    layers, types = config.count("num_hidden_layers"), config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers")
        if not isinstance(first, int) or first < 0:
            raise config.refused("max_window_layers", "must be a number of layers")
        return [window if layer >= first else None for layer in range(layers)]
    known = {"full_attention": None, "sliding_attention": window}
    if window is None:
        del known["sliding_attention"]
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(known):
        raise config.refused("layer_types", f"must be one of {sorted(known)} for each layer")
    return [known[name] for name in types]


# Values that a field of any family may have.
SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "quantization_config": (None,),
    "num_experts": (None,),
    "num_local_experts": (None,),
}
DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
QWEN_DEFAULTS = {
    **DEFAULTS,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        defaults=DEFAULTS,
        supported={
            "sliding_window": (None,),
            "use_sliding_window": (None, False),
            "layer_types": (None,),
        },
        biased=_llama_biases,
        windows=_no_windows,
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        defaults={**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
        supported={
            "attention_bias": (None, False),
            "mlp_bias": (None, False),
            "use_sliding_window": (None,),
            "layer_types": (None,),
        },
        windows=_one_window,
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        defaults=QWEN_DEFAULTS,
        supported={"attention_bias": (None, True), "mlp_bias": (None, False)},
        biased=lambda config: QKV,
        windows=_windows_by_layer,
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        defaults={**QWEN_DEFAULTS, "head_dim": 128},
        supported={"mlp_bias": (None, False)},
        biased=lambda config: ATTENTION if config.flag("attention_bias") else (),
        windows=_windows_by_layer,
        qk_norm=True,
    ),
}
