"""An engine on the CPU whose steps run the batch-invariant kernels, in Triton's interpreter."""

from pathlib import Path
from typing import Any

import torch

from lorry.kernels.lora import AdapterTables
from lorry.kernels.page_layout import BASE_MODEL
from lorry.kernels.pool_view import PoolView
from lorry.kernels.tiles import RowTiles
from lorry.rpc.model_families import DecoderOptions
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.lora_sharing import OwnProducts
from lorry.worker.products import invariant_linear
from lorry.worker.step_input import StepInput
from lorry.worker.triton_operations import TritonOperations, allocate_device_state
from tests.support.engines import EngineHarness


def invariant_operations(
    step: StepInput,
    tables: AdapterTables,
    pool: PoolView,
    cos_sin_L2D: torch.Tensor,
    options: DecoderOptions,
    _: Any,
) -> TritonOperations:
    """In place of `TorchOperations`."""
    num_rows = len(step.token_id_T)
    state = allocate_device_state(
        pool,
        tables,
        step.block_table_SP.int(),
        cos_sin_L2D,
        options,
        lora=OwnProducts(),
        max_rows=num_rows,
        batch_invariant=True,
    )
    return TritonOperations(
        state,
        position_T=step.position_T.int(),
        page_T=step.page_T.int(),
        sequence_T=_owners(step.attention_tiles, num_rows),
        slot_T=_owners(step.lora_tiles, num_rows),
        groups=LoraGroups.ALL,
    )


def _owners(tiles: RowTiles, num_rows: int) -> torch.Tensor:
    """What each row belongs to."""
    owner_T = torch.full((num_rows + 1,), BASE_MODEL, dtype=torch.int32)
    owner_T[tiles.row_NM] = tiles.owner_N[:, None].int()  # the row after the last stands for none
    return owner_T[:-1]


def interpreted_engine(model: Path, directory: Path, **config: Any) -> EngineHarness:
    """Steps must run while `torch_runner.TorchOperations` is `invariant_operations`."""
    harness = EngineHarness(model, directory, **config)
    runner: Any = harness.engine.runner
    runner._model = runner._model.with_product(invariant_linear)
    return harness
