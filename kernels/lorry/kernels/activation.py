"""SwiGLU.

Shape suffixes: T = rows of the step, I = intermediate size.
"""

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before

BLOCK_I = 1024  # one load of 16 bytes a thread


def swiglu_reference(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``."""
    return torch.nn.functional.silu(gate_TI) * up_TI


@triton.jit
def _swiglu_kernel(
    gate_ptr,  # [T, I]
    up_ptr,  # [T, I]
    out_ptr,  # [T, I]
    stride_gt,
    stride_ut,
    stride_ot,
    intermediate,
    BLOCK_I: tl.constexpr,
):
    """One program for each row and block of columns."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_row = i < intermediate
    gate = tl.load(gate_ptr + row * stride_gt + i, mask=in_row, other=0.0)
    up = tl.load(up_ptr + row * stride_ut + i, mask=in_row, other=0.0)
    exact = gate.to(tl.float32)
    silu = (exact / (1 + tl.exp(-exact))).to(gate.dtype)
    out = (silu.to(tl.float32) * up.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_ot + i, out, mask=in_row)


def swiglu(gate_TI: torch.Tensor, up_TI: torch.Tensor, out_TI: torch.Tensor) -> None:
    """Write ``silu(gate) * up`` into `out_TI`."""
    num_rows, intermediate = gate_TI.shape
    _swiglu_kernel[(num_rows, triton.cdiv(intermediate, BLOCK_I))](
        gate_TI,
        up_TI,
        out_TI,
        gate_TI.stride(0),
        up_TI.stride(0),
        out_TI.stride(0),
        intermediate,
        BLOCK_I=BLOCK_I,
        num_warps=4,
        launch_pdl=has_dependent_launch(out_TI.device),
    )
