from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save

from lorry.adapter_store.image import NUMPY_DTYPES
from lorry.adapter_store.lora import tensor_names
from lorry.adapter_store.peft_config import parse_config, resolve
from lorry.adapter_store.weights import CheckedWeights, check_weights
from lorry.kernels.page_layout import MODULES, Dtype
from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import AdapterInvalid
from tests.support.adapters import TINY, Tensors, lora_config, lora_tensors

CONFIG = lora_config(r=4, targets=MODULES, rank_pattern={"down_proj": 9}, layers_to_transform=[1])
A_NAME, B_NAME = tensor_names(1, "down_proj")


def check(
    tensors: Tensors, config: dict[str, Any] = CONFIG, dtype: Dtype = Dtype.FP32
) -> CheckedWeights:
    content = memoryview(save(tensors))
    return check_weights(content, resolve(config, TINY), TINY, NUMPY_DTYPES[dtype])


def test_the_weights_of_the_config_are_accepted() -> None:
    tensors = lora_tensors(CONFIG)
    checked = check(tensors)
    assert checked.weights_bytes == sum(values.nbytes for values in tensors.values())
    assert len(checked.digest) == 32


def drop(tensors: Tensors) -> None:
    del tensors[B_NAME]


def add_other_layer(tensors: Tensors) -> None:
    tensors[tensor_names(0, "down_proj")[0]] = tensors[A_NAME]


def add_bias(tensors: Tensors) -> None:
    tensors[B_NAME.replace("weight", "bias")] = np.zeros(4, np.float32)


def add_magnitude(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"] = tensors[B_NAME]


def add_head(tensors: Tensors) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors[A_NAME]


def turn(tensors: Tensors) -> None:
    tensors[A_NAME] = np.ascontiguousarray(tensors[A_NAME].T)


def widen(tensors: Tensors) -> None:
    tensors[A_NAME] = np.zeros((9, 129), np.float32)


def lower_rank(tensors: Tensors) -> None:
    tensors[A_NAME], tensors[B_NAME] = tensors[A_NAME][:8], tensors[B_NAME][:, :8].copy()


def flatten(tensors: Tensors) -> None:
    tensors[A_NAME] = tensors[A_NAME].reshape(-1)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop, B_NAME),
        (add_other_layer, tensor_names(0, "down_proj")[0]),
        (add_bias, B_NAME.replace("weight", "bias")),
        (add_magnitude, "base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"),
        (add_head, "base_model.model.lm_head.lora_A.weight"),
        (turn, A_NAME),
        (widen, A_NAME),
        (lower_rank, A_NAME),
        (flatten, A_NAME),
    ],
)
def test_weights_of_another_shape_are_refused_naming_the_tensor(
    damage: Callable[[Tensors], None], named: str
) -> None:
    tensors = lora_tensors(CONFIG)
    damage(tensors)
    with pytest.raises(AdapterInvalid) as caught:
        check(tensors)
    assert caught.value.violations[0].field == named


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", [np.float32, np.float16, bfloat16])
def test_a_value_that_is_not_finite_is_refused(value: float, source: Any) -> None:
    tensors = lora_tensors(CONFIG, dtype=source)
    tensors[B_NAME][2, 3] = value
    with pytest.raises(AdapterInvalid, match=B_NAME):
        check(tensors)


@pytest.mark.parametrize(
    ("value", "dtype", "accepted"),
    [
        (65504.0, Dtype.FP16, True),
        (65520.0, Dtype.FP16, False),
        (65520.0, Dtype.BF16, True),
        (3.39e38, Dtype.BF16, True),
        (3.40e38, Dtype.BF16, False),
        (3.40e38, Dtype.FP32, True),
    ],
)
def test_values_must_be_finite_in_the_serving_dtype(
    value: float, dtype: Dtype, accepted: bool
) -> None:
    tensors = lora_tensors(CONFIG)
    tensors[A_NAME][0, 0] = value
    if accepted:
        check(tensors, dtype=dtype)
    else:
        with pytest.raises(AdapterInvalid, match=A_NAME):
            check(tensors, dtype=dtype)


def test_every_byte_and_every_scale_is_part_of_the_digest() -> None:
    tensors = lora_tensors(CONFIG)
    digests = {check(tensors).digest, check(tensors, CONFIG | {"lora_alpha": 9}).digest}
    digests.add(check({n: v.astype(bfloat16) for n, v in tensors.items()}).digest)
    tensors[A_NAME][0, 0] = np.nextafter(tensors[A_NAME][0, 0], np.float32(9))
    digests.add(check(tensors).digest)
    assert len(digests) == 4
    assert check(dict(reversed(tensors.items()))).digest in digests


DEMO = Path(__file__).parents[2] / "demo"


@pytest.mark.parametrize("directory", sorted((DEMO / "adapters").iterdir()), ids=lambda p: p.name)
def test_what_peft_trained_for_the_demo_is_accepted(directory: Path) -> None:
    geometry = read_base_model(DEMO / "model").geometry
    config = parse_config((directory / "adapter_config.json").read_text())
    content = memoryview((directory / "adapter_model.safetensors").read_bytes())
    for dtype in NUMPY_DTYPES.values():
        check_weights(content, resolve(config, geometry), geometry, dtype)
