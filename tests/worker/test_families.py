"""Every model family answers token for token like transformers + peft in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lorry.rpc.base_model import read_base_model
from lorry.rpc.model_config import UnsupportedModel
from lorry.worker.rope_table import rope_table
from tests.support.engines import EngineHarness
from tests.support.equal_tokens import World, check_answers
from tests.support.families import ADAPTERS, FAMILIES, LINEAR, LLAMA3, YARN, family_world
from tests.support.models import Reference, make_model
from tests.support.rank_threads import rank_harness


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return family_world(tmp_path_factory.mktemp(request.param), request.param)


def test_all_adapters_in_one_batch(world: World, tmp_path: Path) -> None:
    harness = EngineHarness(world.model, tmp_path, step_tokens=1024)
    check_answers(world, harness)
    assert harness.engine.gauges.max_adapters_beside_base_in_step == len(ADAPTERS)


def test_prompts_cut_into_chunks_anywhere(world: World, tmp_path: Path) -> None:
    check_answers(world, EngineHarness(world.model, tmp_path, max_running=8, step_tokens=13))


# Sizes and strategies that families take in turn.
RANKS = ((2, "replicated"), (2, "slora"), (4, "replicated"))


def test_tensor_parallel_ranks_answer_alike(
    world: World, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family = request.node.callspec.params["world"]
    size, strategy = RANKS[list(FAMILIES).index(family) % len(RANKS)]
    with rank_harness(
        world.model, tmp_path, tensor_parallel=size, lora_strategy=strategy, step_tokens=1024
    ) as harness:
        check_answers(world, harness)


PLAIN: dict[str, dict[str, Any]] = {
    "llama-3.1": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "llama-linear-biased": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "mistral": {"sliding_window": None},
    "qwen2-upper-windows": {"use_sliding_window": False},
    "qwen2.5-yarn": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "qwen3-biased-windows": {"use_sliding_window": False, "layer_types": None},
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_options_of_the_tests_change_the_tokens(name: str, tmp_path: Path) -> None:
    """So that answers without an option cannot pass for those with it."""
    prompt = torch.randint(3, 320, (257,), generator=torch.Generator().manual_seed(0)).tolist()
    answers: list[list[int]] = []
    for fields in (FAMILIES[name], FAMILIES[name] | PLAIN[name]):
        model = make_model(tmp_path / str(len(answers)), **fields)
        answers.append(Reference(model).greedy(prompt, None, 24, eos=None).token_ids)
    assert answers[0] != answers[1]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_in_many_files_are_those_of_one(family: str, tmp_path: Path) -> None:
    one = make_model(tmp_path / "one", model_type=family, head_dim=32)
    many = make_model(tmp_path / "many", model_type=family, head_dim=32, max_shard_bytes=100_000)
    assert len(list(many.glob("model-*.safetensors"))) > 2
    answers: list[list[int]] = []
    for model in (one, many):
        harness = EngineHarness(model, tmp_path)
        number = harness.submit(list(range(3, 40)), None, 24, stop_token_ids=[])
        harness.run()
        answers.append(harness.tokens[number])
    assert answers[0] == answers[1]
    assert read_base_model(one).digest == read_base_model(many).digest


def test_a_missing_shard_is_refused_by_file(tmp_path: Path) -> None:
    model = make_model(tmp_path, model_type="llama", max_shard_bytes=100_000)
    lost = sorted(model.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UnsupportedModel, match=lost.name):
        read_base_model(model)


def test_a_head_beside_tied_embeddings_must_equal_them(tmp_path: Path) -> None:
    model = make_model(tmp_path, model_type="llama", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    EngineHarness(model, tmp_path)
    tensors["lm_head.weight"][5] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight differs"):
        EngineHarness(model, tmp_path)


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": LINEAR,
    "llama3": LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn of qwen2.5": YARN
    | {"rope_theta": 1_000_000.0, "original_max_position_embeddings": 32_768},
    "yarn with all fields": YARN
    | {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.3},
    "yarn with mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
}


@pytest.mark.parametrize("is_old", [False, True], ids=["parameters", "scaling"])
@pytest.mark.parametrize("name", ROPES)
def test_angles_equal_those_of_transformers_bit_for_bit(
    name: str, is_old: bool, tmp_path: Path
) -> None:
    """Up to far positions, with the options as old and new directories write them."""
    rope = dict(ROPES[name])
    fields: dict[str, Any] = {"rope_parameters": rope}
    if is_old:
        fields = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        rope["type"] = rope.pop("rope_type")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "max_position_embeddings": 40_000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    table = rope_table(read_base_model(tmp_path))
    embedding = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    positions = torch.arange(len(table))
    cosines, sines = embedding(torch.zeros(1, dtype=torch.float32), positions[None])
    assert torch.equal(table[:, 0], cosines[0])
    assert torch.equal(table[:, 1], sines[0])
