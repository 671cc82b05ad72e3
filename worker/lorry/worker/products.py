"""The linear layers of a step on a GPU: the fastest of cuBLAS's, or batch-invariant ones.

Shape suffixes: T = rows of the step, I = input width, O = output width.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn.functional import linear

from lorry.kernels.cublas_lt import CublasLt, Shape
from lorry.kernels.invariant_product import invariant_product
from lorry.kernels.launch_settings import product_setting
from lorry.worker.operations import Product

# By GPU and version of cublasLt; `python -m benchmarks.tune_products` writes it.
ALGORITHMS = Path(__file__).with_name("product_algorithms.json")
ALIGNMENT = 256  # bytes, of what the algorithms were asked for

log = logging.getLogger(__name__)


def torch_linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    /,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `Product`."""
    if onto_TO is None:
        return linear(x_TI, weight_OI, bias_O)
    if bias_O is not None:
        onto_TO += bias_O
    return onto_TO.addmm_(x_TI, weight_OI.T)


def fastest_linear(device: torch.device, dtype: torch.dtype) -> Product:
    """By the algorithms that were measured as the fastest on such a GPU, else torch's."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return torch_linear
    try:
        library = CublasLt(device)
    except OSError as error:  # a torch that brings its own
        log.warning("products are by the algorithms that torch takes: %s", error)
        return torch_linear
    gpu = torch.cuda.get_device_name(device)
    algorithms = measured_algorithms(gpu, library.version)
    log.info(
        "the table of products has %d shapes, of all models, for %s with cublasLt %d",
        len(algorithms),
        gpu,
        library.version,
    )
    return FastestLinear(library, algorithms) if algorithms else torch_linear


def measured_algorithms(gpu: str, version: int, path: Path = ALGORITHMS) -> Mapping[Shape, int]:
    """By shape, the number of the fastest algorithm, where it is not cuBLAS's first."""
    measured, found = json.loads(path.read_text()), dict[Shape, int]()
    for weight, by_rows in measured.get(f"{gpu}, cublasLt {version}", {}).items():
        outputs, inputs = map(int, weight.split("x"))
        found |= {(int(rows), outputs, inputs): number for rows, number in by_rows.items()}
    return found


class FastestLinear:
    """See `Product`. What has a bias, or no entry in `algorithms`, is torch's."""

    def __init__(self, library: CublasLt, algorithms: Mapping[Shape, int]) -> None:
        self._library, self._algorithms = library, dict(algorithms)

    def __call__(
        self,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        /,
        onto_TO: torch.Tensor | None = None,
    ) -> torch.Tensor:
        outputs, inputs = weight_OI.shape
        algorithm = self._algorithm((len(x_TI), outputs, inputs))
        if algorithm is None or bias_O is not None or not _are_plain(x_TI, weight_OI, onto_TO):
            return torch_linear(x_TI, weight_OI, bias_O, onto_TO)
        return self._library.product(x_TI, weight_OI, algorithm, onto_TO)

    def _algorithm(self, shape: Shape) -> int | None:
        """None where there is no entry, or this GPU has fewer algorithms than the measured one."""
        algorithm = self._algorithms.get(shape)
        if algorithm is None or algorithm < self._library.count(shape):
            return algorithm
        log.warning(
            "algorithm %d of products of %s is not there: torch's is taken; "
            "`python -m benchmarks.tune_products` measures those that are",
            algorithm,
            shape,
        )
        del self._algorithms[shape]
        return None


def _are_plain(*tensors: torch.Tensor | None) -> bool:
    there = [tensor for tensor in tensors if tensor is not None]
    return all(each.is_contiguous() and each.data_ptr() % ALIGNMENT == 0 for each in there)


def invariant_linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    /,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `Product`. A row's result does not depend on the others."""
    setting = product_setting(x_TI.dtype, weight_OI.shape[0])
    return invariant_product(x_TI, weight_OI, bias_O, setting, onto_TO)
