"""Exact thresholds of logits by bisection over their ordered bits; no sorting, no atomics.

A threshold is the smallest number above which less than a target lies: of logits, for the k-th
largest one, or of probability. Sums are per lane, then over the lanes, so their order is fixed.

Shape suffix: V = lanes of a program.
"""

import torch
import triton
import triton.language as tl

# Low bits that are equal in all numbers of a type as float32: the bisection leaves them out.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _key(number, UNUSED: tl.constexpr):
    """An integer for each float32, in their order."""
    bits = number.to(tl.int32, bitcast=True) >> UNUSED
    return bits ^ ((bits >> 31) & (tl.full((), 0x7FFFFFFF, tl.int32) >> UNUSED))


@triton.jit
def _number(key, UNUSED: tl.constexpr):
    bits = key ^ ((key >> 31) & (tl.full((), 0x7FFFFFFF, tl.int32) >> UNUSED))
    return (bits << UNUSED).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low_key, high_key):
    """Their mean, rounded down; their sum could overflow."""
    return (low_key >> 1) + (high_key >> 1) + (low_key & high_key & 1)


@triton.jit
def load_logits(logits_ptr, start, length, BLOCK_V: tl.constexpr):
    place = start + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + place, mask=place < length, other=-float("inf"))
    return logits.to(tl.float32)


@triton.jit
def weight(logits, most, temperature):
    """Probability in units of the largest."""
    return tl.exp((logits - most) / temperature)


@triton.jit
def sum_weights(logits_ptr, length, least, most, temperature, BLOCK_V: tl.constexpr):
    """Of the logits that reach `least`."""
    total_V = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, length, BLOCK_V):
        logits_V = load_logits(logits_ptr, start, length, BLOCK_V)
        total_V += tl.where(logits_V >= least, weight(logits_V, most, temperature), 0.0)
    return tl.sum(total_V, 0)


@triton.jit
def find_threshold(
    logits_ptr,
    length,
    low,
    most,
    target,
    temperature,
    WEIGHTED: tl.constexpr,
    UNUSED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The smallest number from `low` to `most` above which less than `target` lies.

    What lies there is a weight if `WEIGHTED`, else a number of logits.
    """
    # A number between two of the logits' type is cut to its neighbour towards 0.
    low_key = _key(low, UNUSED) - 1
    low_key = tl.maximum(low_key, _key(tl.full((), -float("inf"), tl.float32), UNUSED))
    high_key = _key(most, UNUSED)
    while low_key < high_key:
        middle_key = _middle(low_key, high_key)
        middle = _number(middle_key, UNUSED)
        above_V = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, length, BLOCK_V):
            logits_V = load_logits(logits_ptr, start, length, BLOCK_V)
            if WEIGHTED:
                counted_V = weight(logits_V, most, temperature)
            else:
                counted_V = tl.full((BLOCK_V,), 1.0, tl.float32)
            above_V += tl.where(logits_V > middle, counted_V, 0.0)
        is_low = tl.sum(above_V, 0) < target
        high_key = tl.where(is_low, middle_key, high_key)
        low_key = tl.where(is_low, low_key, middle_key + 1)
    return _number(low_key, UNUSED)


@triton.jit
def kth_largest(logits_V, most, k, UNUSED: tl.constexpr):
    """Of numbers in registers, the largest of which is `most`; `k` is at most their number."""
    low_key, high_key = _key(tl.min(logits_V, 0), UNUSED), _key(most, UNUSED)
    while low_key < high_key:
        middle_key = _middle(low_key, high_key)
        num_above = tl.sum((logits_V > _number(middle_key, UNUSED)).to(tl.int32), 0)
        high_key = tl.where(num_above < k, middle_key, high_key)
        low_key = tl.where(num_above < k, low_key, middle_key + 1)
    return _number(low_key, UNUSED)
