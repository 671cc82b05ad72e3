"""Whether tensors are equal bit for bit."""

import hashlib

import torch


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's bits, where NaN is not equal to itself."""
    bits = tensor.contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(bits.tobytes()).hexdigest()
