from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorry.kernels.page_layout import Dtype, PageLayout, TpStrategy
from lorry.kernels.partition import Part, Partition
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.model_config import UnsupportedModel
from lorry.worker.weights import (
    CheckpointReader,
    ModelWeights,
    RandomWeights,
    WeightReader,
    load_weights,
)
from tests.support.families import FAMILIES
from tests.support.models import make_llama, make_model

CPU = torch.device("cpu")


def partition_of(base_model: BaseModel, size: int = 1, rank: int = 0) -> Partition:
    return Partition(
        PageLayout(
            geometry=base_model.geometry,
            dtype=Dtype.FP32,
            tp_size=size,
            tp_rank=rank,
            tp_strategy=TpStrategy.REPLICATED,
        )
    )


def shards(base_model: BaseModel, reader: WeightReader, size: int) -> list[ModelWeights]:
    return [
        load_weights(base_model, reader, partition_of(base_model, size, rank))
        for rank in range(size)
    ]


def test_weights_must_be_safetensors(tmp_path: Path) -> None:
    model = make_llama(tmp_path, num_hidden_layers=1)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    base_model = read_base_model(model)
    reader = CheckpointReader(base_model, torch.float32, CPU)
    with pytest.raises(UnsupportedModel, match=r"no \.safetensors file .*'model.embed_tokens"):
        load_weights(base_model, reader, partition_of(base_model))


def test_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    base_model = read_base_model(make_llama(tmp_path, num_hidden_layers=1))
    reader = CheckpointReader(base_model, torch.float32, CPU)
    with pytest.raises(UnsupportedModel, match=r"model.norm.weight.*\(65,\).*\(64,\)"):
        reader.read("model.norm.weight", Part.all_of(65))


def test_random_weights_have_the_model_s_shapes_and_are_never_zero(tmp_path: Path) -> None:
    base_model = read_base_model(make_llama(tmp_path, num_hidden_layers=1))
    reader = RandomWeights(torch.bfloat16, CPU)
    weights = load_weights(base_model, reader, partition_of(base_model))
    layer = weights.layers[0]
    assert layer.qkv.weight_OI.shape == (64 + 2 * 32, 64)
    assert layer.down.weight_OI.shape == (64, 128)
    assert layer.qkv.weight_OI.std() > 0
    assert abs(float(layer.input_norm.mean()) - 1) < 0.1


def test_random_weights_of_ranks_are_parts_of_the_same_whole(tmp_path: Path) -> None:
    base_model = read_base_model(make_llama(tmp_path, num_hidden_layers=1))
    reader = RandomWeights(torch.float32, CPU)
    (whole,) = shards(base_model, reader, 1)
    parts = shards(base_model, reader, 2)
    down = torch.cat([part.layers[0].down.weight_OI for part in parts], dim=1)
    assert torch.equal(down, whole.layers[0].down.weight_OI)
    assert torch.equal(torch.cat([part.head for part in parts]), whole.head)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_the_whole_products_between_them(family: str, tmp_path: Path) -> None:
    """Four query heads, two KV heads and widths that not all numbers of ranks divide."""
    model = make_model(tmp_path, **FAMILIES[family], intermediate_size=130, vocab_size=322)
    for size in (1, 2, 4, 8):
        check_products(model, size)


def check_products(model: Path, size: int) -> None:
    """The first layer's and the head's, by all ranks and by the whole tensors."""
    base_model = read_base_model(model)
    tensors = load_file(model / "model.safetensors")
    parts = shards(base_model, CheckpointReader(base_model, torch.float32, CPU), size)
    head_dim = base_model.geometry.head_dim
    x = torch.randn(3, base_model.geometry.hidden, generator=torch.Generator().manual_seed(0))
    mlp, attention = "model.layers.0.mlp", "model.layers.0.self_attn"

    def whole(name: str, values: torch.Tensor) -> torch.Tensor:
        bias = tensors.get(f"{name}.bias")
        product = values @ tensors[f"{name}.weight"].T
        return product if bias is None else product + bias

    def add(outputs: Iterator[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(outputs)).sum(0)

    down = add(_feed_forward(part, x) for part in parts)
    gate, up = whole(f"{mlp}.gate_proj", x), whole(f"{mlp}.up_proj", x)
    torch.testing.assert_close(down, whole(f"{mlp}.down_proj", gate * up), rtol=1e-4, atol=1e-5)

    queries = whole(f"{attention}.q_proj", x)
    keys = whole(f"{attention}.k_proj", x).view(3, -1, head_dim).repeat_interleave(2, 1)
    values = whole(f"{attention}.v_proj", x).view(3, -1, head_dim).repeat_interleave(2, 1)
    mixed = queries.view_as(keys) * keys + values
    expected = whole(f"{attention}.o_proj", mixed.flatten(1))
    actual = add(_attend(part, x, head_dim) for part in parts)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    logits = torch.cat([x @ part.head.T for part in parts], dim=1)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    torch.testing.assert_close(logits[:, : base_model.vocab_size], x @ head.T)
    assert not logits[:, base_model.vocab_size :].any()


def _feed_forward(part: ModelWeights, x: torch.Tensor) -> torch.Tensor:
    """A product of gate and up, so that a column of one rank needs both."""
    layer = part.layers[0]
    gate, up = torch.nn.functional.linear(x, *layer.gate_up).chunk(2, dim=1)
    return torch.nn.functional.linear(gate * up, *layer.down)


def _attend(part: ModelWeights, x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Something of each query head and its KV head."""
    layer = part.layers[0]
    qkv = torch.nn.functional.linear(x, *layer.qkv).view(len(x), -1, head_dim)
    heads = layer.o.weight_OI.shape[1] // head_dim
    kv_heads = (qkv.shape[1] - heads) // 2
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    k, v = (kv.repeat_interleave(heads // kv_heads, 1) for kv in (k, v))
    return torch.nn.functional.linear((q * k + v).flatten(1), *layer.o)
