"""The demo model in transformers + peft, fp32 on CPU, greedy: what Lorry's answers must equal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.paths import MODEL_DIR, adapter_dir
from demo.specs import ADAPTERS


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]  # with the end of sequence, if it came
    text: str
    # Over the steps, the least (top logit - second logit) / standard deviation of the logits.
    smallest_gap: float


@dataclass(frozen=True)
class Reference:
    model: Any  # a PeftModel, whose generate is untyped
    tokenizer: Any

    @classmethod
    def load(cls, adapters: Sequence[str] = tuple(ADAPTERS)) -> Self:
        base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        first, *others = adapters
        model = PeftModel.from_pretrained(base, adapter_dir(first), adapter_name=first)
        for name in others:
            model.load_adapter(adapter_dir(name), adapter_name=name)
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")
        return cls(model.eval(), tokenizer)

    def complete(self, adapter: str, prompt: str, max_tokens: int) -> Completion:
        """Answer one prompt alone, so that no padding touches its arithmetic."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        with self._using(adapter):
            output = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        token_ids = output.sequences[0, inputs.input_ids.shape[1] :].tolist()
        return Completion(token_ids, self._text(token_ids), _smallest_gap(output.logits))

    def answers(self, adapter: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Answer many prompts in one padded batch."""
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        with self._using(adapter):
            output = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        return [self._text(row) for row in output[:, inputs.input_ids.shape[1] :].tolist()]

    def _text(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    @contextmanager
    def _using(self, adapter: str) -> Iterator[None]:
        """Switch to an adapter; the empty id is the base model."""
        if adapter:
            self.model.set_adapter(adapter)
            yield
        else:
            with self.model.disable_adapter():
                yield


def _smallest_gap(step_logits: Sequence[torch.Tensor]) -> float:
    gaps: list[float] = []
    for logits in step_logits:
        first, second = logits[0].topk(2).values.tolist()
        gaps.append((first - second) / logits[0].std().item())
    return min(gaps)
