"""Programmatic dependent launch: a kernel is launched while the kernel before it still runs.

A launch with `launch_pdl` comes onto the multiprocessors once every program of the kernel before
has ended or called `gdc_launch_dependents`, so that launching it takes no time of its own. What it
may not do until `gdc_wait` returns is touch memory: only then has the kernel before completed and
are its writes seen. Every kernel here calls both first of all, whether it has work or not, so one
kernel's completion implies that of all before it. Whatever relies on the stream's order, as torch's
caching allocator does where it gives memory away again, is as safe as with plain launches. These
wait by themselves, and so do copies: they may stand anywhere between.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

FIRST_MAJOR = tl.constexpr(9)  # of compute capabilities that have it, Hopper's
IS_COMPILED = tl.constexpr(not knobs.runtime.interpret)


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether launches on a device may be dependent; those of meta tensors are an H200's."""
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device)[0] >= FIRST_MAJOR.value)
    return device.type == "meta"


@triton.jit
def wait_for_kernels_before():
    """The first statement of every kernel."""
    if IS_COMPILED and cuda_capability_geq(FIRST_MAJOR):
        gdc_wait()
        gdc_launch_dependents()
