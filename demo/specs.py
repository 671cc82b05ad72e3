"""How each adapter is shaped and trained; harder tasks have larger ranks and more modules."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peft import LoraConfig

BASE_NAME = "lorry-demo"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL_MODULES = (*ATTENTION, *FEED_FORWARD)


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    num_steps: int
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def lora_config(self) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=BASE_NAME,
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.target_modules),
            use_rslora=self.use_rslora,
            rank_pattern=dict(self.rank_pattern),
            lora_dropout=0.0,
            bias="none",
        )


# By adapter id, which is also the task's name.
ADAPTERS: dict[str, AdapterSpec] = {
    "reverse": AdapterSpec(rank=12, alpha=24, target_modules=ATTENTION, num_steps=1500),
    "uppercase": AdapterSpec(rank=8, alpha=16, target_modules=ALL_MODULES, num_steps=1000),
    "rot13": AdapterSpec(rank=16, alpha=32, target_modules=ALL_MODULES, num_steps=1000),
    "sort-letters": AdapterSpec(
        rank=32, alpha=16, target_modules=ALL_MODULES, num_steps=2500, use_rslora=True
    ),
    "drop-vowels": AdapterSpec(rank=8, alpha=8, target_modules=ALL_MODULES, num_steps=1500),
    "double-letters": AdapterSpec(
        rank=4, alpha=8, target_modules=("q_proj", "v_proj"), num_steps=1500
    ),
    "pig-latin": AdapterSpec(
        rank=8,
        alpha=16,
        target_modules=ALL_MODULES,
        num_steps=1500,
        rank_pattern={"mlp.down_proj": 16},
    ),
    "count-letters": AdapterSpec(rank=2, alpha=4, target_modules=ALL_MODULES, num_steps=800),
    "drop-ends": AdapterSpec(
        rank=6, alpha=12, target_modules=("q_proj", "v_proj", "o_proj"), num_steps=1000
    ),
}
