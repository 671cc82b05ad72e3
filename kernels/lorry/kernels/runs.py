"""Runs: rows of a step that follow each other and share an owner, a sequence or an adapter."""

import triton
import triton.language as tl


@triton.jit
def run_bounds(owner, owner_ptr, t, num_rows, BLOCK_T: tl.constexpr):
    """First row and end of the run in which each row `t` of `owner` stands."""
    before = tl.load(owner_ptr + t - 1, mask=(t > 0) & (t < num_rows), other=-2)
    after = tl.load(owner_ptr + t + 1, mask=t + 1 < num_rows, other=-2)
    first = tl.associative_scan(tl.where(owner != before, t, 0), 0, _larger)
    end = tl.where(owner != after, t + 1, BLOCK_T)
    return first, tl.associative_scan(end, 0, _smaller, reverse=True)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)
