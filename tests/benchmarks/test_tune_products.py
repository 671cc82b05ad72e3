"""The table of the fastest products."""

import json

import pytest
import torch

from benchmarks.products import ADDED, PRODUCTS, Body
from benchmarks.tune_products import update_table
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.kernels.partition import Partition
from lorry.rpc.base_model import read_base_model
from lorry.worker.products import torch_linear
from lorry.worker.weights import RandomWeights, load_weights
from tests.support.processes import DEMO_MODEL


@pytest.mark.parametrize("adds", [False, True])
def test_products_are_measured_with_the_addition_that_they_run_with(adds):
    base_model = read_base_model(DEMO_MODEL)
    layout = PageLayout(geometry=base_model.geometry, dtype=Dtype.FP32)
    random = RandomWeights(torch.float32, torch.device("cpu"))
    weights = load_weights(base_model, random, Partition(layout))
    onto_residual = []

    def multiply(x_TI, weight_OI, bias_O=None, /, onto_TO=None):
        onto_residual.append(onto_TO is not None)
        return torch_linear(x_TI, weight_OI, bias_O, onto_TO)

    Body(weights, base_model.geometry, 8, adds=adds).run(3, PRODUCTS, multiply)
    layer = [adds and product in ADDED for product in PRODUCTS]
    assert onto_residual == layer * len(weights.layers)


def test_what_was_measured_is_replaced_and_the_rest_kept(tmp_path):
    path, key = tmp_path / "table.json", "NVIDIA H200, cublasLt 130100"
    update_table(path, "NVIDIA H100", 130100, {(1, 64, 32): 3})
    assert json.loads(path.read_text()) == {"NVIDIA H100, cublasLt 130100": {"64x32": {"1": 3}}}
    other = {"NVIDIA H100, cublasLt 130100": {"64x32": {"1": 3}}}
    path.write_text(json.dumps(other | {key: {"64x32": {"1": 2, "8": 5, "16": 1}}}))
    update_table(path, key.split(", ")[0], 130100, {(8, 64, 32): 0, (16, 64, 32): 4})
    assert json.loads(path.read_text()) == other | {key: {"64x32": {"1": 2, "16": 4}}}
    update_table(path, key.split(", ")[0], 130100, {(1, 64, 32): 0, (16, 64, 32): 0})
    assert json.loads(path.read_text()) == other | {key: {}}
