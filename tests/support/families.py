"""Small random models of every family, with each option that a family has.

Contexts are short, so the windows and the contexts before RoPE scaling are, too.
"""

from pathlib import Path
from typing import Any

from tests.support.equal_tokens import World

WINDOW = 40
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-3.1": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-linear-biased": {
        "model_type": "llama",
        "rope_parameters": LINEAR,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-upper-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen2.5-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-biased-windows": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
ADAPTERS = ["r1", "r16-rslora", "pattern"]
LENGTHS = [1, 17, WINDOW, 100, 257]


def family_world(directory: Path, name: str) -> World:
    """A model of the family, three adapters and the reference's answers to eight requests."""
    return World(directory, FAMILIES[name], adapters=ADAPTERS, lengths=LENGTHS)
