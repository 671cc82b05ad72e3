"""Which algorithm a product takes."""

import json

import pytest
import torch
from torch.nn.functional import linear

from lorry.kernels.cublas_lt import MOST_ALGORITHMS
from lorry.worker.products import (
    ALGORITHMS,
    fastest_linear,
    invariant_linear,
    measured_algorithms,
    torch_linear,
)


def test_a_cpu_takes_torchs_product():
    assert fastest_linear(torch.device("cpu"), torch.bfloat16) is torch_linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("multiply", [torch_linear, invariant_linear])
def test_a_product_may_be_added_to_what_there_is(multiply, has_bias):
    x, weight, residual = torch.randn(3, 32), torch.randn(48, 32), torch.randn(3, 48)
    bias = torch.randn(48) if has_bias else None
    expected = residual + linear(x, weight, bias)
    onto = residual.clone()
    assert multiply(x, weight, bias, onto_TO=onto) is onto
    torch.testing.assert_close(onto, expected)
    torch.testing.assert_close(multiply(x, weight, bias), linear(x, weight, bias))


def test_algorithms_are_those_of_the_gpu_and_the_library(tmp_path):
    path = tmp_path / "algorithms.json"
    path.write_text(json.dumps({"NVIDIA H200, cublasLt 130101": {"6144x4096": {"64": 2}}}))
    assert measured_algorithms("NVIDIA H200", 130101, path) == {(64, 6144, 4096): 2}
    assert measured_algorithms("NVIDIA H200", 130102, path) == {}
    assert measured_algorithms("NVIDIA H100 80GB HBM3", 130101, path) == {}


def test_the_shipped_table_replaces_first_algorithms_only():
    table = json.loads(ALGORITHMS.read_text())
    assert table
    for key in table:
        gpu, version = key.split(", cublasLt ")
        for shape, algorithm in measured_algorithms(gpu, int(version)).items():
            assert all(size > 0 for size in shape)
            assert 0 < algorithm < MOST_ALGORITHMS
