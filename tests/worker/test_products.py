"""Which algorithm a product takes."""

import json

import pytest
import torch
from torch.nn.functional import linear

from lorry.kernels.cublas_lt import MOST_ALGORITHMS, CublasLt
from lorry.worker import products
from lorry.worker.products import (
    ALGORITHMS,
    FastestLinear,
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


class Library(CublasLt):
    """Has two algorithms of each shape, and writes down which it was asked for."""

    def __init__(self):
        self.asked = list[tuple[int, int]]()

    def count(self, shape):
        return 2

    def product(self, x_TI, weight_OI, algorithm, onto_TO=None):
        self.asked.append((len(x_TI), algorithm))
        return linear(x_TI, weight_OI)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(products, "ALIGNMENT", 4)  # no more can be relied on outside a GPU
    return Library()


def test_torchs_product_is_taken_where_the_measured_algorithm_is_not_there(library, caplog):
    multiply = FastestLinear(library, {(3, 48, 32): 1, (4, 48, 32): 2})
    weight = torch.randn(48, 32)
    for rows in (3, 4, 4, 5):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(multiply(x, weight), linear(x, weight))
    assert library.asked == [(3, 1)]
    assert caplog.text.count("algorithm 2 of products of (4, 48, 32) is not there") == 1


def test_only_plain_tensors_without_a_bias_go_to_the_library(library):
    multiply = FastestLinear(library, {(3, 48, 32): 1})
    x, weight = torch.randn(3, 32), torch.randn(48, 32)
    multiply(x, weight, torch.randn(48))
    multiply(torch.randn(3, 64)[:, :32], weight)
    multiply(x, torch.randn(32, 48).T)
    assert library.asked == []


def test_the_shipped_table_replaces_first_algorithms_only():
    table = json.loads(ALGORITHMS.read_text())
    assert table
    for key in table:
        gpu, version = key.split(", cublasLt ")
        for shape, algorithm in measured_algorithms(gpu, int(version)).items():
            assert all(size > 0 for size in shape)
            assert 0 < algorithm < MOST_ALGORITHMS
