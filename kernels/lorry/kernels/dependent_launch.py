"""Programmatic dependent launch: a kernel is launched while the kernel before it still runs.

A launch with `launch_pdl` comes onto the multiprocessors once every program of the kernel before
has ended or called `gdc_launch_dependents`, so that launching it takes no time of its own. What it
may not do until `gdc_wait` returns is touch memory: only then has the kernel before completed and
are its writes seen. Every kernel here calls both, whether it has work or not, so one kernel's
completion implies that of all before it. Whatever relies on the stream's order, as torch's
caching allocator does where it gives memory away again, is as safe as with plain launches. These
wait by themselves, and so do copies: they may stand anywhere between.

One exception: `load_early` reads before `gdc_wait` what no kernel writes that may still run. While
a kernel waits, every program of the kernel before it has returned from its own wait, so that
all before that one have completed. Attention reads so the positions of a step's rows and what was
planned from them: a step begins with these, and whoever attends writes keys and values in between.
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
    """Stands before every access to memory but `load_early`."""
    if IS_COMPILED and cuda_capability_geq(FIRST_MAJOR):
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_early(ptr, mask, other: tl.constexpr):
    """Read what was written before the kernel before was launched, past the first-level cache."""
    return tl.load(ptr, mask=mask, other=other, cache_modifier=".cg")
