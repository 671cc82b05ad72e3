"""Score every adapter and the base on held-out words: python -m demo.evaluate

Writes the table into demo/README.md and fails if a bar is missed.
"""

import json
import sys
from dataclasses import dataclass

import torch
from rich.progress import track

from demo.paths import MODEL_DIR, README_FILE, TRAINING_FILE, adapter_dir
from demo.reference import Reference
from demo.specs import ADAPTERS, ALL_MODULES
from demo.tasks import ALL_TASKS, MAX_ANSWER_TOKENS, held_out_words, make_prompt

NUM_WORDS = 300
SEED = 1
LEAST_ADAPTER_SHARE = 0.97
MOST_BASE_SHARE = 0.05
TABLE_BEGIN, TABLE_END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Score:
    adapter: str
    right: int
    base_right: int

    @property
    def passes(self) -> bool:
        return (
            self.right >= LEAST_ADAPTER_SHARE * NUM_WORDS
            and self.base_right <= MOST_BASE_SHARE * NUM_WORDS
        )


def main() -> None:
    torch.set_num_threads(1)  # threads only wait for each other on a model this small
    words = held_out_words(NUM_WORDS, SEED)
    reference = Reference.load()
    copies = answers(reference, "", words)
    scores = [
        score(name, words, answers(reference, name, words), copies)
        for name in track(ADAPTERS, description="evaluating")
    ]
    copied = count_equal(copies, words)
    table = markdown_table(scores, copied)
    print(table)
    write_table(table)
    missed = [score.adapter for score in scores if not score.passes]
    if missed or copied < LEAST_ADAPTER_SHARE * NUM_WORDS:
        sys.exit(f"bar missed: base copies {copied}, adapters {missed}")


def answers(reference: Reference, adapter: str, words: list[str]) -> list[str]:
    prompts = [make_prompt(word) for word in words]
    return reference.answers(adapter, prompts, MAX_ANSWER_TOKENS)


def score(name: str, words: list[str], replies: list[str], copies: list[str]) -> Score:
    right = [ALL_TASKS[name](word) for word in words]
    return Score(name, count_equal(replies, right), count_equal(copies, right))


def count_equal(replies: list[str], right: list[str]) -> int:
    return sum(reply == answer for reply, answer in zip(replies, right, strict=True))


def markdown_table(scores: list[Score], copied: int) -> str:
    training = json.loads(TRAINING_FILE.read_text())
    head = [
        f"| model | shape | weights | trained | exact of {NUM_WORDS} | base, of {NUM_WORDS} |",
        "|---|---|---:|---:|---:|---:|",
        f"| base | copies the word | {size_kb('base')} kB | {training['base']['seconds']:.0f} s "
        f"| {percent(copied)} | |",
    ]
    return "\n".join(
        head
        + [
            f"| {score.adapter} | {shape(score.adapter)} | {size_kb(score.adapter)} kB "
            f"| {training[score.adapter]['seconds']:.0f} s "
            f"| {percent(score.right)} | {percent(score.base_right)} |"
            for score in scores
        ]
    )


def percent(count: int) -> str:
    return f"{100 * count / NUM_WORDS:.1f} %"


def shape(name: str) -> str:
    """The committed adapter_config.json in words."""
    config = json.loads((adapter_dir(name) / "adapter_config.json").read_text())
    modules = [module for module in ALL_MODULES if module in config["target_modules"]]
    short = "all seven" if len(modules) == len(ALL_MODULES) else "+".join(m[0] for m in modules)
    ranks = "".join(f", {key} r {rank}" for key, rank in config["rank_pattern"].items())
    rslora = ", rsLoRA" if config["use_rslora"] else ""
    return f"r {config['r']}, alpha {config['lora_alpha']}, {short}{ranks}{rslora}"


def size_kb(name: str) -> int:
    """Bytes of weights, in thousands."""
    path = (
        MODEL_DIR / "model.safetensors"
        if name == "base"
        else adapter_dir(name) / "adapter_model.safetensors"
    )
    return round(path.stat().st_size / 1000)


def write_table(table: str) -> None:
    """Put the table between the README's two markers."""
    before, rest = README_FILE.read_text().split(TABLE_BEGIN)
    after = rest.split(TABLE_END)[1]
    README_FILE.write_text(f"{before}{TABLE_BEGIN}\n{table}\n{TABLE_END}{after}")


if __name__ == "__main__":
    main()
