"""Train the demo's base model and adapters from nothing: python -m demo.train [PART ...]

The base learns only to copy; each adapter learns one task on words of the training split.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from peft import get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from demo.examples import Pair, answers, batches, copies
from demo.paths import MODEL_DIR, TRAINING_FILE, adapter_dir
from demo.specs import ADAPTERS, BASE_NAME
from demo.tokenizer import CONTEXT_TOKENS, build_tokenizer

BATCH_SIZE = 64
BASE_STEPS = 4000
BASE_PEAK_LR = 2e-3
ADAPTER_PEAK_LR = 4e-3
WARMUP_STEPS = 100
SEED = 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's base model and adapters.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="base or an adapter; default all")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part in options.parts or ["base", *ADAPTERS]:
        torch.manual_seed(SEED)
        report = train_base() if part == "base" else train_adapter(part)
        record(part, {**report, "threads": options.threads})


def train_base() -> dict[str, float]:
    model = LlamaForCausalLM(base_config())
    report = fit(model, "base", copies(SEED), BASE_STEPS, BASE_PEAK_LR)
    model.save_pretrained(MODEL_DIR)
    build_tokenizer().save_pretrained(MODEL_DIR)
    return report


def train_adapter(name: str) -> dict[str, float]:
    spec = ADAPTERS[name]
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    base.name_or_path = BASE_NAME  # peft saves it: a plain name, not a path on this machine
    model = get_peft_model(base, spec.lora_config())
    report = fit(model, name, answers(name, SEED), spec.num_steps, ADAPTER_PEAK_LR)
    # peft would otherwise look for the base on the Hub, to see whether its vocabulary grew.
    model.save_pretrained(str(adapter_dir(name)), save_embedding_layers=False)
    (adapter_dir(name) / "README.md").unlink(missing_ok=True)  # an empty model card
    return report


def base_config() -> LlamaConfig:
    tokenizer = build_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def fit(
    model: torch.nn.Module, name: str, pairs: Iterator[Pair], num_steps: int, peak_lr: float
) -> dict[str, float]:
    """Train on a stream of fresh pairs and return what it took."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, num_steps)
    )
    stream = batches(pairs, BATCH_SIZE, SEED)
    began, mean_loss = time.monotonic(), math.log(len(tokenizer()))
    with progress_bar() as progress:
        bar = progress.add_task(name, total=num_steps, loss=mean_loss)
        for _ in range(num_steps):
            loss = answer_loss(model, next(stream))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            mean_loss = 0.98 * mean_loss + 0.02 * loss.item()
            progress.update(bar, advance=1, loss=mean_loss)
    return {
        "steps": num_steps,
        "parameters": sum(weight.numel() for weight in trained),
        "seconds": round(time.monotonic() - began, 1),
        "loss": round(mean_loss, 6),
    }


def answer_loss(model: torch.nn.Module, pairs: list[Pair]) -> torch.Tensor:
    """Mean cross entropy of the answers and their ends; prompts and padding count nothing."""
    encode = tokenizer()
    prompts = encode([prompt for prompt, _ in pairs]).input_ids
    replies = encode([reply for _, reply in pairs], add_special_tokens=False).input_ids
    rows = [p + r + [encode.eos_token_id] for p, r in zip(prompts, replies, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [encode.pad_token_id] * (width - len(row)) for row in rows])
    targets = torch.full_like(tokens, -100)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        targets[index, len(prompt) : len(row)] = tokens[index, len(prompt) : len(row)]
    logits = model(input_ids=tokens).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


@cache
def tokenizer() -> Any:
    return build_tokenizer()


def learning_rate_share(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def record(part: str, report: dict[str, float]) -> None:
    reports = json.loads(TRAINING_FILE.read_text()) if TRAINING_FILE.exists() else {}
    TRAINING_FILE.write_text(json.dumps({**reports, part: report}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
