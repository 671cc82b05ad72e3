import json

import pytest
import torch
from safetensors.torch import load_file

from demo import expect, ninth, tasks
from demo.paths import (
    ADAPTERS_DIR,
    DEMO_DIR,
    EXPECTED_FILE,
    MODEL_DIR,
    NINTH_DIR,
    adapter_dir,
)
from demo.reference import Reference
from demo.specs import ADAPTERS, ALL_MODULES, BASE_NAME

# peft still reads the property under the name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

MOST_WEIGHT_BYTES = 16_000_000
EXPECTED = json.loads(EXPECTED_FILE.read_text())


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(1)
    return Reference.load()


def configs():
    return {
        name: json.loads((adapter_dir(name) / "adapter_config.json").read_text())
        for name in ADAPTERS
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_answers_held_out_words(reference, name):
    task = tasks.ALL_TASKS[name]
    words = tasks.held_out_words(20, seed=11)
    prompts = [tasks.make_prompt(word) for word in words]
    replies = reference.answers(name, prompts, tasks.MAX_ANSWER_TOKENS)
    wrong = [reply for word, reply in zip(words, replies, strict=True) if reply != task(word)]
    assert len(wrong) <= 1, wrong


def test_base_copies_the_word(reference):
    words = tasks.held_out_words(20, seed=11)
    prompts = [tasks.make_prompt(word) for word in words]
    assert reference.answers("", prompts, tasks.MAX_ANSWER_TOKENS) == words


def test_expected_requests_are_200_over_eight_adapters_and_the_base():
    assert len(EXPECTED) == expect.NUM_REQUESTS == 200
    assert {record["adapter"] for record in EXPECTED} == {"", *tasks.TASKS}
    assert [(record["adapter"], record["prompt"]) for record in EXPECTED] == expect.requests()
    lengths = {len(tasks.word_of(record["prompt"])) for record in EXPECTED}
    assert lengths == set(range(tasks.MIN_LETTERS, tasks.MAX_LETTERS + 1))


def test_no_expected_token_is_a_near_tie():
    assert min(record["smallest_gap"] for record in EXPECTED) >= expect.LEAST_GAP


@pytest.mark.parametrize("record", EXPECTED[:20], ids=lambda record: record["prompt"])
def test_expected_tokens_are_those_of_transformers_and_peft(reference, record):
    completion = reference.complete(record["adapter"], record["prompt"], record["max_tokens"])
    assert completion.token_ids == record["token_ids"]
    assert completion.text == record["text"]


@pytest.mark.parametrize(
    "text", ["banana>", " a  b\n\t.", "größer žluťoučký 日本語 🎉", "\x00\x7f"]
)
def test_tokens_are_bytes_and_round_trip(reference, text):
    token_ids = reference.tokenizer(text).input_ids
    assert token_ids[0] == reference.tokenizer.bos_token_id
    assert len(token_ids) == 1 + len(text.encode())
    assert reference.tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_committed_adapters_are_those_described():
    assert {path.name for path in ADAPTERS_DIR.iterdir()} == set(tasks.TASKS)
    for name, config in configs().items():
        spec = ADAPTERS[name]
        assert (config["r"], config["lora_alpha"]) == (spec.rank, spec.alpha)
        assert set(config["target_modules"]) == set(spec.target_modules)
        assert config["use_rslora"] == spec.use_rslora
        assert config["rank_pattern"] == spec.rank_pattern
        assert config["base_model_name_or_path"] == BASE_NAME


def test_adapters_differ_in_shape():
    specs = [ADAPTERS[name] for name in tasks.TASKS]
    assert {spec.rank for spec in specs} >= {2, 4, 8, 12, 16, 32}
    assert len({frozenset(spec.target_modules) for spec in specs}) >= 3
    assert any(set(spec.target_modules) == set(ALL_MODULES) for spec in specs)
    assert sum(spec.use_rslora for spec in specs) == 1
    assert any(spec.rank_pattern for spec in specs)
    assert any(spec.alpha != spec.rank for spec in specs)


def test_weights_are_fp32_and_small():
    files = list(DEMO_DIR.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= MOST_WEIGHT_BYTES
    for path in files:
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_nothing_names_a_local_path():
    for path in [*config_files(), MODEL_DIR / "config.json", MODEL_DIR / "tokenizer_config.json"]:
        assert str(DEMO_DIR.parent) not in path.read_text()


def config_files():
    return [adapter_dir(name) / "adapter_config.json" for name in ADAPTERS]


def test_ninth_adapter_saved_again_is_the_same(tmp_path):
    ninth.save_adapter(ninth.load_ninth_adapter(), str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    committed = load_file(NINTH_DIR / "adapter_model.safetensors")
    assert saved.keys() == committed.keys()
    assert all(torch.equal(saved[name], committed[name]) for name in saved)
