"""Every option of PEFT that the store accepts: what peft saves, through a real store to tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorry.kernels.page_layout import MODULES
from lorry.rpc.errors import AdapterInvalid
from lorry.v1.adapter_data_service_pb2 import ImageHeader
from lorry.worker import messages as m
from lorry.worker.image_header import to_image
from tests.support.adapter_store import RunningStore, running_store
from tests.support.engines import EngineHarness
from tests.support.models import Greedy, Reference, first_difference, make_adapter, make_llama

MAX_TOKENS = 16
ALL = list(MODULES)
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"only {module}": {"r": 5, "target_modules": [module]} for module in MODULES},
    "rslora": {"r": 9, "lora_alpha": 7, "target_modules": ALL, "use_rslora": True},
    "rank_pattern": {
        "r": 4,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 12, r"layers\.1\.mlp\.up_proj": 1, "model.*down_proj": 3},
    },
    "alpha_pattern": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ALL,
        "alpha_pattern": {"v_proj": 48, r"layers\.2\.self_attn\.o_proj": 2, r".*\.0\..*": 24},
    },
    "rslora and patterns": {
        "r": 6,
        "lora_alpha": 5,
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"q_proj|up_proj": 16, "v_proj": 2},
        "alpha_pattern": {"up_proj": 1, r"layers\.1\.self_attn\.v_proj": 9},
    },
    "layers_to_transform": {"r": 4, "target_modules": ALL, "layers_to_transform": [0, 2]},
    "one layer": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "layers_pattern": {
        "r": 4,
        "target_modules": ALL,
        "layers_to_transform": [1, 2],
        "layers_pattern": ["blocks", "layers"],
    },
    "longer suffixes": {"r": 4, "target_modules": ["self_attn.q_proj", "mlp.gate_proj", "k_proj"]},
    "a regular expression": {
        "r": 4,
        "target_modules": r".*\.[02]\.(self_attn\.[qkv]|mlp\.up)_proj",
    },
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "excluded by suffix": {
        "r": 4,
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj", "model.layers.1.self_attn.v_proj"],
    },
    "excluded by expression": {
        "r": 4,
        "target_modules": ALL,
        "exclude_modules": r".*\.1\..*|.*o_proj",
    },
    "a fraction of alpha": {"r": 4, "lora_alpha": 0.5, "target_modules": ALL},
    "gaussian": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
    "eva": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "eva"},
    "initialised by default": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": True},
    "training and book-keeping": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj"],
        "lora_dropout": 0.3,
        "inference_mode": True,
        "revision": "main",
        "base_model_name_or_path": "/another/base",
        "fan_in_fan_out": False,
        "bias": "none",
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "init_lora_weights": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [4, 5]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "task_type": {"task_type": "FEATURE_EXTRACTION"},
}


class World:
    """A model, and what peft saved for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = make_llama(directory / "model")
        self.adapters = {
            name: self._saved(name, seed, fields)
            for seed, (name, fields) in enumerate(OPTIONS.items())
        }
        reference, random = Reference(self.model), np.random.default_rng(0)
        self.requests: list[tuple[list[int], Path | None, Greedy]] = []
        for number, adapter in enumerate([None, *self.adapters.values()]):
            prompt = random.integers(3, 320, 3 + number).tolist()
            self.requests.append((prompt, adapter, reference.greedy(prompt, adapter, MAX_TOKENS)))

    def _saved(self, name: str, seed: int, fields: dict[str, Any]) -> Path:
        directory = self.directory / name.replace(" ", "-")
        defaults: dict[str, Any] = {"lora_alpha": 30}
        return make_adapter(directory, self.model, seed=seed, **(defaults | fields))


class StoreHarness(EngineHarness):
    """An engine whose images are those that a store has sent."""

    def __init__(self, model: Path, directory: Path) -> None:
        super().__init__(model, directory)
        self._directory = directory
        self._versions: dict[Path, bytes] = {}
        self._received: dict[bytes, m.ImageReady] = {}

    async def upload(self, store: RunningStore, adapter: Path) -> None:
        """Register what peft saved, and fetch the image that the store makes of it."""
        version = await push(store, adapter)
        self._versions[adapter] = version
        responses = [each async for each in store.client.fetch(version)]
        header: ImageHeader = responses[0].header
        path = self._directory / version.hex()
        path.write_bytes(b"".join(each.chunk.data for each in responses[1:]))
        self._received[version] = to_image(header, str(path), 0)

    def version_of(self, adapter: Path | None) -> bytes:
        return self._versions[adapter] if adapter else b""

    def image(self, version: bytes) -> m.ImageReady:
        return self._received[version]


async def push(store: RunningStore, adapter: Path) -> bytes:
    """The version as which the store has registered a directory."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    adapter_id = adapter.name.replace("_", "-")
    return (await store.client.push(adapter_id, config, weights)).version


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("options"))


@pytest.mark.filterwarnings("ignore")
async def test_every_accepted_option_has_pefts_tokens_all_in_one_batch(
    world: World, tmp_path: Path
) -> None:
    harness = StoreHarness(world.model, tmp_path)
    async with running_store(tmp_path / "store", model=world.model) as store:
        for adapter in world.adapters.values():
            await harness.upload(store, adapter)
    requests = world.requests * 2
    numbers = [harness.submit(prompt, adapter, MAX_TOKENS) for prompt, adapter, _ in requests]
    harness.run()
    for number, (_, path, expected) in zip(numbers, requests, strict=True):
        assert first_difference(expected, harness.tokens[number]) is None, path
    assert harness.engine.gauges.max_adapters_beside_base_in_step == len(OPTIONS)


def test_every_adapter_of_the_options_changes_the_tokens(world: World) -> None:
    base = Reference(world.model)
    adapted = [request for request in world.requests if request[1]]
    assert len(adapted) == len(OPTIONS)
    for prompt, path, expected in adapted:
        assert base.greedy(prompt, None, MAX_TOKENS).token_ids != expected.token_ids, path


@pytest.mark.filterwarnings("ignore")
async def test_what_peft_saves_with_any_other_option_is_refused_by_name(
    world: World, tmp_path: Path
) -> None:
    async with running_store(tmp_path / "store", model=world.model) as store:
        for field, options in REFUSED.items():
            fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | options
            adapter = make_adapter(tmp_path / field, world.model, seed=0, **fields)
            with pytest.raises(AdapterInvalid) as caught:
                await push(store, adapter)
            assert [violation.field for violation in caught.value.violations] == [field]
