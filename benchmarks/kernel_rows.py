"""Norms, activation, rotation and sampling: a few reads and writes for each row."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.kernel_cases import Device, Measurement
from benchmarks.timing import graph_us
from lorry.kernels.activation import swiglu
from lorry.kernels.logprobs import MAX_TOP, packed_logprobs, rank, unpacked, write_logprobs
from lorry.kernels.norm import rms_norm
from lorry.kernels.rope import cos_sin_table, rope_write_kv
from lorry.kernels.sampling import sample
from lorry.kernels.truncation import truncate

MODEL = "llama-3-8b"
VOCABULARY = 128256
POSITIONS = 8192
EPS = 1e-5
ROWS = (64, 256, 1024)
MAX_SAMPLED_ROWS = 256
LIKELY_TOKENS, LIKELY_LOGIT = 64, 12.0  # that models prefer to the others
COPIES = 8  # of the operands, so that launches of a graph read different memory


def measure_all(device: Device) -> Iterator[Measurement]:
    for rows in ROWS:
        yield _norm(device, rows)
        yield _swiglu(device, rows)
        yield _rope(device, rows)
        if rows <= MAX_SAMPLED_ROWS:
            yield _sample(device, rows, "greedy", 0.0)
            yield _sample(device, rows, "temperature", 1.0)
            yield _truncate(device, rows, "top-k 50", top_k=50)
            yield _truncate(device, rows, "top-p 0.9", top_p=0.9)
            yield _truncate(device, rows, "top-k 50, top-p 0.9", top_k=50, top_p=0.9)
            yield _truncate(device, rows, "top-p 0.9 of flat logits", top_p=0.9, likely=0)
            yield _truncate(device, rows, "nothing cut off")
            yield _logprobs(device, rows, 0)
            yield _logprobs(device, rows, MAX_TOP)


def _randn(device: Device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device.device, dtype=torch.bfloat16)


def _copies(launch: Callable[[int], object]) -> float:
    return graph_us([partial(launch, copy) for copy in range(COPIES)])


def _norm(device: Device, rows: int) -> Measurement:
    hidden = device.pools[MODEL].layout.geometry.hidden
    x, out = (_randn(device, COPIES, rows, hidden) for _ in range(2))
    weight = _randn(device, hidden)
    us = _copies(lambda c: rms_norm(x[c], weight, EPS, out[c]))
    return Measurement(f"RMSNorm, {rows} rows", us, 2 * x[0].nbytes)


def _swiglu(device: Device, rows: int) -> Measurement:
    width = device.pools[MODEL].layout.geometry.intermediate
    gate_up, out = _randn(device, COPIES, rows, 2 * width), _randn(device, COPIES, rows, width)
    us = _copies(lambda c: swiglu(gate_up[c, :, :width], gate_up[c, :, width:], out[c]))
    return Measurement(f"SwiGLU, {rows} rows", us, gate_up[0].nbytes + out[0].nbytes)


def _rope(device: Device, rows: int) -> Measurement:
    pool = device.pools[MODEL]
    shape = pool.layout.geometry
    qkv = _randn(device, COPIES, rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    table = cos_sin_table(POSITIONS, shape.head_dim, 5e5).to(device.device)
    position = torch.randint(0, POSITIONS, (rows,), device=device.device, dtype=torch.int32)
    page = torch.randperm(pool.num_pages, device=device.device)[:rows].int()
    us = _copies(lambda c: rope_write_kv(q[c], k[c], v[c], table, position, page, pool, c))
    return Measurement(f"RoPE + KV write, {rows} rows", us, 2 * qkv[0].nbytes)


def _truncate(
    device: Device,
    rows: int,
    name: str,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    likely: int = LIKELY_TOKENS,
) -> Measurement:
    """The search of the thresholds alone, which precedes a draw."""
    logits = _randn(device, COPIES, rows, VOCABULARY)
    logits[:, :, :likely] += LIKELY_LOGIT
    ones = torch.ones(rows, device=device.device)
    top_k_T = torch.full((rows,), top_k, dtype=torch.int32, device=device.device)
    top_p_T, min_p_T = ones * top_p, ones * 0

    def cut(copy: int) -> None:
        truncate(logits[copy], ones, top_k_T, top_p_T, min_p_T)

    return Measurement(f"truncate {name}, {rows} rows", _copies(cut), logits[0].nbytes)


def _logprobs(device: Device, rows: int, num_top: int) -> Measurement:
    logits = _randn(device, COPIES, rows, VOCABULARY)
    token = torch.arange(rows, device=device.device)
    num_top_T = torch.full((rows,), num_top, dtype=torch.int32, device=device.device)
    out = unpacked(packed_logprobs(rows, device.device))

    def report(copy: int) -> None:
        write_logprobs(logits[copy], rank(logits[copy], num_top_T), token, num_top_T, out)

    return Measurement(f"logprobs, top {num_top}, {rows} rows", _copies(report), logits[0].nbytes)


def _sample(device: Device, rows: int, name: str, temperature: float) -> Measurement:
    logits = _randn(device, COPIES, rows, VOCABULARY)
    row = torch.arange(rows, device=device.device)
    temperature_T = torch.full((rows,), temperature, device=device.device)
    token = torch.empty_like(row)
    us = _copies(lambda c: sample(logits[c], temperature_T, row, row, token))
    return Measurement(f"sample {name}, {rows} rows", us, logits[0].nbytes)
