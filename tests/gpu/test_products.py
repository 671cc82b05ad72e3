"""Products by chosen algorithms of cuBLAS."""

import pytest
import torch
from torch.nn.functional import linear

from lorry.kernels.cublas_lt import CublasLt
from lorry.worker.products import (
    FastestLinear,
    fastest_linear,
    measured_algorithms,
    torch_linear,
)
from tests.support.kernel_cases import TOLERANCE, relative_error

SHAPES = [(1, 6144, 4096), (64, 4096, 14336), (200, 28672, 4096), (1024, 4096, 4096), (7, 72, 136)]
BF16 = torch.bfloat16


def operands(gpu, shape):
    rows, outputs, inputs = shape
    torch.manual_seed(0)
    return torch.randn(rows, inputs).to(gpu, BF16), torch.randn(outputs, inputs).to(gpu, BF16)


def deviation_of_sums(shape):
    """The standard deviation of a sum of as many products."""
    return shape[2] ** 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_algorithm_of_a_shape_is_right_and_repeats_bit_for_bit(gpu, shape):
    library, (x, weight) = CublasLt(gpu), operands(gpu, shape)
    exact = linear(x.double(), weight.double())
    assert library.count(shape) > 0
    residual = torch.randn(exact.shape).to(gpu, BF16) * deviation_of_sums(shape)
    for algorithm in range(library.count(shape)):
        product = library.product(x, weight, algorithm)
        assert relative_error(product, exact) < TOLERANCE[BF16]
        assert torch.equal(library.product(x, weight, algorithm), product)
        total = library.product(x, weight, algorithm, onto_TO=residual.clone())
        assert relative_error(total, exact + residual) < TOLERANCE[BF16]


def test_products_are_captured_in_graphs(gpu):
    library, shape = CublasLt(gpu), (64, 4096, 4096)
    x, weight = operands(gpu, shape)
    last = library.count(shape) - 1
    expected, graph = library.product(x, weight, last), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = library.product(x, weight, last)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_what_was_not_measured_is_left_to_torch(gpu):
    shape = (64, 4096, 4096)
    x, weight = operands(gpu, shape)
    bias = torch.randn(4096, device=gpu, dtype=BF16)
    multiply = FastestLinear(CublasLt(gpu), {shape: 1})
    exact = linear(x.double(), weight.double())
    assert relative_error(multiply(x, weight), exact) < TOLERANCE[BF16]
    residual = torch.ones(shape[:2], device=gpu, dtype=BF16)
    multiply(x, weight, onto_TO=residual)
    assert relative_error(residual, exact + 1) < TOLERANCE[BF16]
    assert torch.equal(multiply(x, weight, bias), linear(x, weight, bias))
    assert torch.equal(multiply(x[:63], weight), linear(x[:63], weight))
    columns = x.T.contiguous().T
    assert torch.equal(multiply(columns, weight), linear(columns, weight))
    assert fastest_linear(gpu, torch.float16) is torch_linear


def test_the_table_names_algorithms_that_this_gpu_has(gpu):
    library = CublasLt(gpu)
    measured = measured_algorithms(torch.cuda.get_device_name(gpu), library.version)
    for shape, algorithm in measured.items():
        assert 0 < algorithm < library.count(shape)
