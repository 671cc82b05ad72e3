"""What launchers need to know of the device they launch on."""

from functools import cache

import torch

H200_MULTIPROCESSORS = 132
INTERPRETED_MULTIPROCESSORS = 2  # programs run one after the other there


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors to fill with a persistent grid; those of an H200 for meta tensors."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return H200_MULTIPROCESSORS if device.type == "meta" else INTERPRETED_MULTIPROCESSORS
