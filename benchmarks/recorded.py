"""What other systems reached on the traces of `benchmarks/engine.py`, as it was recorded.

One H200, bf16, all 1,000 requests submitted at once, popularity Zipf, adapters of q, k, v and o in
host memory before the clock starts, at most 512 running sequences, no prefix cache.
"""

from dataclasses import dataclass

DEVICE = "NVIDIA H200"
RECORDED_ALPHA = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One run; `setting` is what of it is not said above."""

    model: str
    ranks: tuple[int, ...]
    adapters: int
    req_per_s: float
    setting: str


VLLM = "vLLM 0.26.0"
# CUDA graphs and torch.compile on, FlashAttention 3, chunked prefill, gpu_memory_utilization 0.9;
# specialize_active_lora off unless said. These are measured settings, not vLLM's best. Without
# adapters LoRA was enabled, and the requests were for the base model.
VLLM_RUNS = (
    Recorded(model="llama-2-7b", ranks=(8,), adapters=0, req_per_s=30.74, setting="max_loras 64"),
    Recorded(model="llama-2-7b", ranks=(8,), adapters=1, req_per_s=26.28, setting="max_loras 64"),
    Recorded(model="llama-2-7b", ranks=(8,), adapters=200, req_per_s=17.36, setting="max_loras 64"),
    Recorded(
        model="llama-2-7b",
        ranks=(8,),
        adapters=1,
        req_per_s=29.50,
        setting="max_loras 64, specialize_active_lora",
    ),
    Recorded(
        model="llama-2-7b",
        ranks=(8,),
        adapters=200,
        req_per_s=19.12,
        setting="max_loras 64, specialize_active_lora",
    ),
    Recorded(
        model="llama-2-7b", ranks=(8,), adapters=200, req_per_s=16.18, setting="max_loras 256"
    ),
    Recorded(
        model="llama-2-7b",
        ranks=(8, 16, 32, 64),
        adapters=200,
        req_per_s=15.90,
        setting="max_loras 64",
    ),
    Recorded(model="llama-3-8b", ranks=(16,), adapters=0, req_per_s=49.15, setting="max_loras 128"),
    Recorded(model="llama-3-8b", ranks=(16,), adapters=1, req_per_s=34.20, setting="max_loras 128"),
    Recorded(
        model="llama-3-8b", ranks=(16,), adapters=200, req_per_s=21.42, setting="max_loras 128"
    ),
    Recorded(
        model="llama-3-8b", ranks=(16,), adapters=1000, req_per_s=12.27, setting="max_loras 128"
    ),
)


def vllm_runs(device: str, model: str, ranks: list[int]) -> dict[str, list[Recorded]]:
    """Of the card, by setting, by number of adapters."""
    found = dict[str, list[Recorded]]()
    for run in sorted(VLLM_RUNS, key=lambda run: run.adapters):
        if (device, run.model, list(run.ranks)) == (DEVICE, model, ranks):
            found.setdefault(run.setting, []).append(run)
    return found
