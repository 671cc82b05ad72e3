from pathlib import Path

import pytest
import torch

from lorry.rpc.base_model import read_base_model
from lorry.rpc.model_config import UnsupportedModel
from lorry.worker.weights import CheckpointReader, RandomWeights, load_weights
from tests.support.models import make_llama

CPU = torch.device("cpu")


def test_weights_must_be_safetensors(tmp_path: Path) -> None:
    model = make_llama(tmp_path, num_hidden_layers=1)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    base_model = read_base_model(model)
    reader = CheckpointReader(base_model, torch.float32, CPU)
    with pytest.raises(UnsupportedModel, match=r"no \.safetensors file .*'model.embed_tokens"):
        load_weights(base_model, reader)


def test_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    base_model = read_base_model(make_llama(tmp_path, num_hidden_layers=1))
    reader = CheckpointReader(base_model, torch.float32, CPU)
    with pytest.raises(UnsupportedModel, match=r"model.norm.weight.*\(65,\).*\(64,\)"):
        reader.read("model.norm.weight", 65)


def test_random_weights_have_the_model_s_shapes_and_are_never_zero(tmp_path: Path) -> None:
    base_model = read_base_model(make_llama(tmp_path, num_hidden_layers=1))
    weights = load_weights(base_model, RandomWeights(torch.bfloat16, CPU))
    layer = weights.layers[0]
    assert layer.qkv.weight_OI.shape == (64 + 2 * 32, 64)
    assert layer.down.weight_OI.shape == (64, 128)
    assert layer.qkv.weight_OI.std() > 0
    assert abs(float(layer.input_norm.mean()) - 1) < 0.1
