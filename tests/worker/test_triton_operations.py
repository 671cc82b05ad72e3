"""The Triton kernels compute a whole step as the torch references do."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorry.kernels.partition import Partition
from lorry.kernels.pool_view import PoolView
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.worker.adapter_memory import DirectAdapterMemory
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.lora_sharing import OwnProducts
from lorry.worker.lora_strategies import Replicated
from lorry.worker.model import Decoder
from lorry.worker.plan import Batch
from lorry.worker.rope_table import rope_table
from lorry.worker.row_sums import NoSums
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_arrays import step_arrays
from lorry.worker.step_input import host_step_arrays, to_step_input
from lorry.worker.torch_operations import TorchOperations
from lorry.worker.torch_runner import TorchRunner
from lorry.worker.triton_operations import TritonOperations, allocate_device_state
from lorry.worker.vocabulary import WholeVocabulary
from lorry.worker.weights import CheckpointReader, load_weights
from tests.support.engines import EngineHarness
from tests.support.interpreted_launches import interpreted_launches
from tests.support.models import make_adapter, make_model

PADDING = 3  # rows


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2, the upper layer in a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = MODELS[request.param]
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2, **fields)


def tensors(batch: Batch, table: SequenceTable) -> dict[str, torch.Tensor]:
    """The step's rows as the kernels take them, padded."""
    padding = {"page": 0, "sequence": -1, "slot": -1, "position": 0, "token_id": 0}
    return {
        name: torch.from_numpy(
            np.concatenate([array, np.full(PADDING, padding[name])]).astype(
                np.int64 if name == "token_id" else np.int32
            )
        )
        for name, array in step_arrays(batch, table).items()
        if name in padding
    }


def states(
    base_model: BaseModel,
    pool: PoolView,
    memory: DirectAdapterMemory,
    batch: Batch,
    table: SequenceTable,
    model: Decoder,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the step's rows by the references and by the kernels."""
    cos_sin, options = rope_table(base_model), base_model.options
    step = to_step_input(host_step_arrays(batch, table), torch.device("cpu"))
    expected = model.forward(
        step.token_id_T, TorchOperations(step, memory.tables, pool, cos_sin, options, Replicated())
    )
    rows = tensors(batch, table)
    device_state = allocate_device_state(
        pool,
        memory.tables,
        torch.from_numpy(table.block_table_RP),
        cos_sin,
        options,
        lora=OwnProducts(),
        max_rows=len(rows["slot"]),
    )
    assert all(work.rotates is not options.qk_norm for work in device_state.lora_works)
    operations = TritonOperations(
        device_state,
        position_T=rows["position"],
        page_T=rows["page"],
        sequence_T=rows["sequence"],
        slot_T=rows["slot"],
        groups=LoraGroups.ALL,
    )
    return expected, model.forward(rows["token_id"], operations)[: batch.num_tokens]


# What padded rows compute from memory that nobody wrote is arbitrary, and never read.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_mixed_steps_have_the_references_hidden_states(model: Path, tmp_path: Path) -> None:
    adapters = [
        make_adapter(tmp_path / "a", model, seed=1, r=3, target_modules="all-linear"),
        make_adapter(tmp_path / "b", model, seed=2, r=20, target_modules=["q_proj", "o_proj"]),
        None,
    ]
    harness = EngineHarness(model, tmp_path, pool_pages=300, max_running=16, step_tokens=24)
    runner = harness.engine.runner
    assert isinstance(runner, TorchRunner)
    for length in (1, 5, 9, 17, 30):
        for adapter in adapters:
            harness.submit(list(range(3, 3 + length)), adapter, max_tokens=4)
    base_model = read_base_model(model)
    pool = runner._pool
    reader = CheckpointReader(base_model, torch.float32, torch.device("cpu"))
    weights = load_weights(base_model, reader, Partition(pool.layout))
    vocabulary = WholeVocabulary(base_model.vocab_size)
    llama = Decoder(weights, vocabulary, NoSums())
    compared, launched = 0, set[str]()
    original = runner.launch

    def launch(batch: Batch, table: SequenceTable):
        nonlocal compared
        if compared < 6:
            with torch.inference_mode(), interpreted_launches() as launches:
                expected, actual = states(base_model, pool, runner.adapters, batch, table, llama)
            # Attention reads its plan while the kernel before it may still run.
            assert ("_plan_kernel", "attention_kernel") not in pairwise(launches)
            launched.update(launches)
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
            compared += 1
        return original(batch, table)

    runner.launch = launch  # type: ignore[method-assign]  # looks at each step on its way
    harness.run()
    assert compared == 6
    assert {"_plan_kernel", "attention_kernel"} <= launched
