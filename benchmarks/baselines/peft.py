"""transformers + peft on the engine benchmark's trace, for a bounded time.

    python -m benchmarks.baselines.peft --model llama-2-7b --adapters 200 --ranks 8

All requests wait at once. *One adapter* serves batches of requests of one adapter, as S-LoRA's
baseline does; *mixed* serves batches in arrival order by peft's `adapter_names`. A batch's prompts
are padded on the left, and it runs until its longest output is done. Batches are taken in random
order for `--seconds`; one that has not ended by then is cut short, and the requests whose outputs
it had drawn count. An adapter is made before its first batch, which costs no time here: peft takes
the longer for it the more there are. Weights are random, and tokens are greedy.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.building import CONFIGS, WEIGHTS_SEED, device_name
from benchmarks.engine import distinct_prompts
from benchmarks.random_images import TARGETS
from benchmarks.results_file import RESULTS, write_result
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAD_TOKEN = 0


class Deadline(StoppingCriteria):
    """Ends a batch when the time is over."""

    def __init__(self, end_s: float) -> None:
        self._end_s = end_s

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        is_over = time.perf_counter() >= self._end_s
        return cast(torch.BoolTensor, torch.full_like(input_ids[:, 0], is_over, dtype=torch.bool))


def build_model(arguments: argparse.Namespace) -> PeftModel:
    """The model with random weights and its first adapter, on the device."""
    torch.manual_seed(WEIGHTS_SEED)
    sizes = json.loads((CONFIGS / arguments.model / "config.json").read_text())
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[arguments.dtype])
    try:
        with torch.device(arguments.device):
            base = LlamaForCausalLM(LlamaConfig(**sizes))
            model = get_peft_model(
                cast(Any, base),
                adapter_config(0, arguments),
                adapter_name=adapter_name(0),
                autocast_adapter_dtype=False,
            )
    finally:
        torch.set_default_dtype(before)
    return cast(PeftModel, model.eval())


def make_adapters(model: PeftModel, adapters: Sequence[int], arguments: argparse.Namespace) -> None:
    """Those that the model does not have yet, of its device and dtype."""
    for adapter in sorted(set(adapters)):
        if adapter_name(adapter) not in model.peft_config:
            with torch.device(arguments.device):
                model.add_adapter(
                    adapter_name(adapter),
                    adapter_config(adapter, arguments),
                    autocast_adapter_dtype=False,
                )
    model.eval()


def adapter_config(adapter: int, arguments: argparse.Namespace) -> LoraConfig:
    rank = arguments.ranks[adapter % len(arguments.ranks)]
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False
    )


def adapter_name(adapter: int) -> str:
    return f"adapter-{adapter}"


def batches_by_adapter(trace: Sequence[TraceRequest], size: int) -> list[list[int]]:
    """Places in the trace: up to `size` requests of one adapter each."""
    by_adapter = defaultdict[int, list[int]](list)
    for place, request in enumerate(trace):
        by_adapter[request.adapter].append(place)
    return [
        of[start : start + size] for of in by_adapter.values() for start in range(0, len(of), size)
    ]


def batches_in_order(trace: Sequence[TraceRequest], size: int) -> list[list[int]]:
    return cut(range(len(trace)), size)


def cut(places: Sequence[int], size: int) -> list[list[int]]:
    return [list(places[start : start + size]) for start in range(0, len(places), size)]


def measure(
    model: PeftModel,
    trace: Sequence[TraceRequest],
    prompts: Sequence[list[int]],
    arguments: argparse.Namespace,
    *,
    is_mixed: bool,
) -> dict[str, Any]:
    """Rates over what was served in the given time."""
    form = batches_in_order if is_mixed else batches_by_adapter
    batches = form(trace, arguments.batch)
    random.Random(arguments.seed).shuffle(batches)
    seconds, requests, tokens, served = 0.0, 0, 0, 0
    for batch in batches:
        if seconds >= arguments.seconds:
            break
        adapters = [trace[place].adapter for place in batch]
        make_adapters(model, adapters, arguments)
        started_s = time.perf_counter()
        end_s = started_s + arguments.seconds - seconds
        lengths = [trace[place].output_tokens for place in batch]
        drawn = generate(
            model, [prompts[p] for p in batch], adapters, max(lengths), end_s, is_mixed
        )
        requests += sum(length <= drawn for length in lengths)
        tokens += sum(min(length, drawn) for length in lengths)
        served += 1
        seconds += time.perf_counter() - started_s
    return {
        "seconds": seconds,
        "batches": served,
        "requests": requests,
        "req_per_s": requests / seconds,
        "out_tok_per_s": tokens / seconds,
    }


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    adapters: Sequence[int],
    length: int,
    end_s: float,
    is_mixed: bool,
) -> int:
    """Draw `length` tokens for each prompt, or as many as there is time for; how many."""
    width, device = max(map(len, prompts)), model.device
    padded = [[PAD_TOKEN] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    options: dict[str, Any] = {}
    if is_mixed:
        options["adapter_names"] = [adapter_name(adapter) for adapter in adapters]
    else:
        model.set_adapter(adapter_name(adapters[0]))
    with torch.inference_mode():
        found = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=PAD_TOKEN,
            stopping_criteria=StoppingCriteriaList([Deadline(end_s)]),
            **options,
        )
    return int(found.shape[1]) - width


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--model", default="llama-2-7b", help="a directory of benchmarks/models")
    result.add_argument("--adapters", type=int, default=200)
    result.add_argument("--ranks", type=int, nargs="+", default=[8], help="cycled over adapters")
    result.add_argument("--requests", type=int, default=1000)
    result.add_argument("--alpha", type=float, default=1.0, help="0 is uniform, 1 is Zipf")
    result.add_argument("--seed", type=int, default=42, help="of the trace and of batches' order")
    result.add_argument("--batch", type=int, default=32, help="most requests of a batch")
    result.add_argument("--seconds", type=float, default=120.0, help="for each of the two modes")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    result.add_argument("--directory", type=type(RESULTS), default=RESULTS, help="for the result")
    result.add_argument("--commit", help="where the tree came without its history")
    return result


def main() -> None:
    arguments = parser().parse_args()
    trace = make_trace(
        TraceSpec(
            requests=arguments.requests,
            adapters=arguments.adapters,
            alpha=arguments.alpha,
            seed=arguments.seed,
        )
    )
    model = build_model(arguments)
    prompts = distinct_prompts(trace, model.config.vocab_size, 0)
    metrics = dict[str, Any]()
    for mode, is_mixed in (("one_adapter", False), ("mixed", True)):
        metrics[mode] = measure(model, trace, prompts, arguments, is_mixed=is_mixed)
        print(f"{mode}: {metrics[mode]}", flush=True)
    name = CONFIGS.joinpath(arguments.model).name
    ranks = "-".join(map(str, arguments.ranks))
    config = {
        key: getattr(arguments, key)
        for key in ("model", "adapters", "ranks", "requests", "alpha", "batch", "dtype")
    }
    write_result(
        f"baseline-peft-{name}-{arguments.adapters}-r{ranks}",
        benchmark="baselines.peft",
        device=device_name(arguments.device),
        config=config | {"trace_seed": arguments.seed, "most_seconds": arguments.seconds},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
