"""The batch-invariant form of a linear layer, for a GPU.

Shape suffixes: T = rows of the step, I = input width, O = output width.
"""

import torch

from lorry.kernels.invariant_product import invariant_product
from lorry.kernels.launch_settings import product_setting


def invariant_linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """``x weight^T + bias``; see `Product`."""
    setting = product_setting(x_TI.dtype, weight_OI.shape[0])
    return invariant_product(x_TI, weight_OI, bias_O, setting)
