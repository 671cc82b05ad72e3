"""What an error that ends the engine means to who runs the worker."""

import torch

from lorry.rpc.model_config import UnsupportedModel
from lorry.worker.device_memory import NoSuchGpu, PoolDoesNotFit

LESS_GPU_MEMORY = "lower memory_fraction, pool_bytes, step_tokens or max_running"
CPU_ALLOCATOR = "DefaultCPUAllocator"
CUDA_ERRORS = ("CUDA error", "[CUDA]", "CUBLAS_STATUS", "cuda runtime error")


def explain(error: Exception) -> str | None:
    """One line that says what happened and what to do; None for a defect of the engine."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError) or _is_cuda_out_of_memory(text):
        return f"the GPU is out of memory; {LESS_GPU_MEMORY}: {text}"
    if any(mark in text for mark in CUDA_ERRORS):
        return (
            "the GPU failed, and what it holds is lost; start the worker again, with "
            f"CUDA_LAUNCH_BLOCKING=1 to learn which kernel it was: {text}"
        )
    if isinstance(error, MemoryError) or CPU_ALLOCATOR in text:
        return f"the machine is out of memory; lower pool_bytes: {text}"
    if isinstance(error, PoolDoesNotFit | NoSuchGpu | UnsupportedModel | OSError):
        return text
    return None


def _is_cuda_out_of_memory(text: str) -> bool:
    is_cuda = any(mark in text for mark in CUDA_ERRORS)
    return is_cuda and ("out of memory" in text or "ALLOC_FAILED" in text)
