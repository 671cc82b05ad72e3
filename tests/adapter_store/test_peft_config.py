"""The same configs go to peft itself and to `resolve`; both must select the same."""

import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from lorry.adapter_store.lora import module_path
from lorry.adapter_store.peft_config import (
    IGNORED,
    MAX_CONFIG_BYTES,
    UNDERSTOOD,
    parse_config,
    resolve,
)
from lorry.kernels.page_layout import MODULES
from lorry.rpc.errors import AdapterInvalid
from tests.support.adapters import TINY, lora_config

SELECTIONS: dict[str, dict[str, Any]] = {
    "suffixes": {"targets": ["q_proj", "down_proj"]},
    "a longer suffix": {"targets": ["self_attn.q_proj", "mlp.up_proj"]},
    "a part of a word is no suffix": {"targets": ["proj", "v_proj"]},
    "whole names": {"targets": ["model.layers.1.self_attn.q_proj", "k_proj"]},
    "a regular expression": {"targets": r".*\.[02]\.self_attn\.(q|k)_proj"},
    "an expression must match the whole name": {"targets": r"model.*_proj"},
    "alternatives": {"targets": r".*(gate|up)_proj|.*o_proj"},
    "all-linear": {"targets": "all-linear"},
    "all-linear in capitals": {"targets": "ALL-Linear"},
    "all-linear without": {"targets": "all-linear", "exclude_modules": ["down_proj"]},
    "exclusion by suffix": {"targets": list(MODULES), "exclude_modules": ["self_attn.v_proj"]},
    "exclusion by expression": {"targets": list(MODULES), "exclude_modules": r".*\.1\..*"},
    "exclusion of a part of a word": {"targets": ["q_proj"], "exclude_modules": ["proj"]},
    "one layer": {"layers_to_transform": 1},
    "layers": {"layers_to_transform": [0, 2, 7]},
    "no layers given": {"layers_to_transform": []},
    "layers by pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers by patterns": {"layers_to_transform": [1, 2], "layers_pattern": ["blocks", "layers"]},
    "an empty pattern": {"layers_to_transform": [1], "layers_pattern": []},
    "layers do not bind whole names": {
        "targets": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "ranks by suffix": {"targets": list(MODULES), "rank_pattern": {"q_proj": 3, "mlp.up_proj": 5}},
    "the first rank counts": {"rank_pattern": {r".*\.0\..*": 3, "q_proj": 5}},
    "the first rank counts, turned": {"rank_pattern": {"q_proj": 5, r".*\.0\..*": 3}},
    "a rank for a whole name": {"rank_pattern": {"model.layers.2.self_attn.v_proj": 32}},
    "a rank for a part of a word": {"rank_pattern": {"proj": 32, ".*_proj": 16}},
    "a rank anchored": {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 32}},
    "ranks with alternatives": {"rank_pattern": {"q_proj|v_proj": 2}},
    "alphas": {"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "v_proj": 40}},
    "fractions of alpha": {"lora_alpha": 0.5, "alpha_pattern": {"v_proj": 1.25}},
    "alpha zero": {"lora_alpha": 0},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 7}},
    "rank above the pattern's": {"r": 300, "rank_pattern": {"q_proj": 4, "v_proj": 8}},
}


def chosen_by_peft(config: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """Rank and scale of each module that peft adapts."""
    model_config = LlamaConfig(
        hidden_size=TINY.hidden,
        intermediate_size=TINY.intermediate,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        vocab_size=32,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config)
        adapted = get_peft_model(model, LoraConfig(**config))
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    }


def chosen_here(config: dict[str, Any]) -> dict[str, tuple[int, float]]:
    spec = resolve(config, TINY)
    return {
        module_path(layer, module): (rank, spec.modules[module].scales[layer])
        for layer, module, rank in spec.parts()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SELECTIONS)
def test_modules_ranks_and_scales_are_those_of_peft(name: str) -> None:
    config = lora_config(**SELECTIONS[name])
    assert chosen_here(config) == chosen_by_peft(config)


def test_what_peft_saves_is_understood(tmp_path: Any) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian").save_pretrained(
        tmp_path
    )
    config = parse_config((tmp_path / "adapter_config.json").read_text())
    assert resolve(config, TINY).max_rank == 4


REFUSED: dict[str, dict[str, Any]] = {
    "peft_type": {"peft_type": "IA3"},
    "r": {"r": 257},
    "lora_alpha": {"lora_alpha": "16"},
    "use_rslora": {"use_rslora": 1},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "target_parameters": {"target_parameters": ["mlp.experts"]},
    "layer_replication": {"layer_replication": [[0, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "task_type": {"task_type": "SEQ_CLS"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "a_field_of_next_year": {"a_field_of_next_year": 0.5},
    "another_field_of_next_year": {"another_field_of_next_year": 0},
    "target_modules": {"targets": ["q_proj", "lm_head"]},
    "rank_pattern": {"rank_pattern": ["q_proj"]},
    "rank_pattern.v_proj": {"rank_pattern": {"v_proj": 0}},
    "alpha_pattern.v_proj": {"alpha_pattern": {"v_proj": None}},
    "exclude_modules": {"exclude_modules": 7},
    "layers_to_transform": {"layers_to_transform": ["1"]},
    "layers_pattern": {"layers_pattern": "layers"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_an_unsupported_value_is_refused_naming_its_field(field: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        resolve(lora_config(**REFUSED[field]), TINY)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    "field", sorted({field.name for field in fields(LoraConfig)} - UNDERSTOOD - IGNORED)
)
def test_every_other_field_of_peft_is_refused_by_name_where_it_is_on(field: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        resolve(lora_config() | {field: {"on": 1}}, TINY)
    named = [violation.field for violation in caught.value.violations]
    assert named == [field]


def test_only_fields_without_a_part_in_inference_are_ignored() -> None:
    """By name, so that no other joins them unseen."""
    adapted = {"base_model_name_or_path", "inference_mode", "lora_dropout", "revision"}
    kept = {"auto_mapping", "megatron_core", "peft_version", "qalora_group_size", "runtime_config"}
    initialisers = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
    assert adapted | kept | initialisers == IGNORED


@pytest.mark.parametrize(
    "initialiser", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"]
)
def test_an_initialiser_that_changes_the_base_is_refused_by_name(initialiser: str) -> None:
    with pytest.raises(AdapterInvalid, match=rf"init_lora_weights: '{initialiser}'"):
        resolve(lora_config(init_lora_weights=initialiser), TINY)


@pytest.mark.parametrize("initialiser", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialiser_that_leaves_the_base_alone_is_accepted(initialiser: bool | str) -> None:
    resolve(lora_config(init_lora_weights=initialiser, eva_config={"rho": 2.0}), TINY)


@pytest.mark.parametrize(
    "targets",
    ["", [], "*", "(", "lm_head", "model.embed_tokens", ["mlp"], ".*", ["nothing"], [3], None],
)
def test_targets_that_cannot_be_served_are_refused(targets: Any) -> None:
    config = lora_config() | {"target_modules": targets}
    with pytest.raises(AdapterInvalid, match=r"^target_modules: "):
        resolve(config, TINY)


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layers_cannot_be_combined_with_an_expression(field: str) -> None:
    with pytest.raises(AdapterInvalid, match=rf"^{field}: "):
        resolve(lora_config(targets=".*q_proj") | {field: [1]}, TINY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"r": NaN}',
        '{"r": 1, "r": 2}',
        "[" * 50_000,
        '{"x": "' + "a" * MAX_CONFIG_BYTES + '"}',
        '{"r": ' + "9" * 5000 + "}",
    ],
)
def test_a_config_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(AdapterInvalid, match=r"^config_json: "):
        parse_config(text)


def test_equal_adapters_have_equal_canonical_text() -> None:
    listed = lora_config(targets=["v_proj", "q_proj"], base_model_name_or_path="/somewhere")
    expression = lora_config(targets=r".*\.(q|v)_proj", lora_dropout=0.1)
    assert resolve(listed, TINY).to_json() == resolve(expression, TINY).to_json()
    assert json.loads(resolve(listed, TINY).to_json())["method"] == "lora"
