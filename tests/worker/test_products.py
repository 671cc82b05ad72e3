"""Which algorithm a product takes."""

import json

import torch
from torch.nn.functional import linear

from lorry.kernels.cublas_lt import MOST_ALGORITHMS
from lorry.worker.products import ALGORITHMS, fastest_linear, measured_algorithms


def test_a_cpu_takes_torchs_product():
    assert fastest_linear(torch.device("cpu"), torch.bfloat16) is linear


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
