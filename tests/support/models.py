"""Small random models and adapters, made by transformers and peft, and their greedy answers."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

EOS = 2


def make_llama(directory: Path, **fields: Any) -> Path:
    return make_model(directory, model_type="llama", **fields)


def make_model(
    directory: Path,
    *,
    model_type: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 1 << 30,
    **fields: Any,
) -> Path:
    """Save a random model with weights large enough that its greedy tokens vary."""
    _use_one_thread()
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "eos_token_id": EOS,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **(defaults | fields))
    model: Any = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # else 0, which is none
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_bytes)
    return directory


def make_adapter(
    directory: Path, model: Path, *, seed: int, dtype: torch.dtype = torch.float32, **fields: Any
) -> Path:
    """Save a random LoRA adapter of `model`, with weights in both A and B that `dtype` can hold."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = LoraConfig(**(defaults | fields))
    adapted = get_peft_model(_base(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1 / config.r**0.25)
            parameter.data = parameter.data.to(dtype).float()
    adapted.save_pretrained(str(directory))
    return directory


class Greedy(NamedTuple):
    """What the reference answers, and how sure it was of each token."""

    token_ids: list[int]
    gaps: list[float]  # between the two largest logits, in standard deviations of the logits


class Reference:
    """transformers + peft in float32: greedy, one request at a time."""

    def __init__(self, model: Path) -> None:
        _use_one_thread()
        self._base = _base(model)
        self._adapted: dict[Path, PeftModel] = {}
        self._model = model

    @torch.inference_mode()
    def greedy(
        self, prompt: list[int], adapter: Path | None, max_tokens: int, *, eos: int | None = EOS
    ) -> Greedy:
        model: Any = self._base if adapter is None else self._with(adapter)
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=-1 if eos is None else eos,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        gaps = [_gap(logits[0]) for logits in output.logits]
        return Greedy(output.sequences[0, len(prompt) :].tolist(), gaps)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], adapter: Path | None) -> torch.Tensor:
        """Of the token after each of `token_ids`, float32."""
        model: Any = self._base if adapter is None else self._with(adapter)
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
        return logits

    def _with(self, adapter: Path) -> PeftModel:
        if adapter not in self._adapted:
            self._adapted[adapter] = PeftModel.from_pretrained(_base(self._model), adapter).eval()
        return self._adapted[adapter]


def first_difference(expected: Greedy, actual: list[int]) -> int | None:
    """Index of the first token that differs and that the reference was sure of."""
    for index, token_id in enumerate(expected.token_ids):
        if index >= len(actual) or actual[index] != token_id:
            return None if expected.gaps[index] < 1e-4 else index
    return None if len(actual) == len(expected.token_ids) else len(expected.token_ids)


def _use_one_thread() -> None:
    """Threads that spin while the others wait for a core make tiny models 50 times slower."""
    torch.set_num_threads(1)


def _gap(logits: torch.Tensor) -> float:
    best, second = logits.topk(2).values.tolist()
    return float((best - second) / logits.std())


def _base(model: Path) -> PreTrainedModel:
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    model_in_float32: PreTrainedModel = base.eval()
    return model_in_float32
