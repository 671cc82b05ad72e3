"""SwiGLU.

Shape suffixes: T = rows of the step, I = intermediate size.
"""

import torch


def swiglu_reference(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``."""
    return torch.nn.functional.silu(gate_TI) * up_TI
