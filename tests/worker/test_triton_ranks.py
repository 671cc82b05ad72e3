"""Tensor-parallel ranks on the Triton kernels compute and draw what one rank does."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lorry.kernels.partition import Partition
from lorry.kernels.pool_view import allocate_pool
from lorry.worker.adapter_memory import DirectAdapterMemory
from lorry.worker.device_vocabulary import Noise, SplitDeviceVocabulary
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.lora_sharing import lora_sharing
from lorry.worker.model import Decoder
from lorry.worker.operations import Operations
from lorry.worker.plan import Batch
from lorry.worker.residency import Adapter
from lorry.worker.rope_table import rope_table
from lorry.worker.row_sums import SeparateSums
from lorry.worker.runner import ReadTokens
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_arrays import step_arrays
from lorry.worker.torch_runner import TorchRunner
from lorry.worker.triton_operations import TritonOperations, allocate_device_state
from lorry.worker.vocabulary import SplitVocabulary
from lorry.worker.weights import CheckpointReader, load_weights
from tests.support.engines import EngineHarness, ImageHarness
from tests.support.models import make_adapter, make_model
from tests.support.turns import TurnCollectives, Turns

CPU = torch.device("cpu")
KV_PAGES = 100
MAX_RANK = 32
STEPS = 3
NOISE = ("temperature", "seed", "output_position")


class RecordedStep(NamedTuple):
    """A step of an engine that is alone."""

    arrays: dict[str, torch.Tensor]  # of `step_arrays`
    block_table_RP: torch.Tensor
    hidden_TH: torch.Tensor
    token_N: list[int]


def record(harness: EngineHarness) -> list[RecordedStep]:
    """Run the harness's requests; its first steps."""
    runner = harness.engine.runner
    assert isinstance(runner, TorchRunner)
    steps: list[RecordedStep] = []
    launch, forward = runner.launch, runner._model.forward
    hidden: list[torch.Tensor] = []

    def forwarded(token_id_T: torch.Tensor, operations: Operations) -> torch.Tensor:
        hidden.append(forward(token_id_T, operations))
        return hidden[-1]

    def launched(batch: Batch, table: SequenceTable) -> ReadTokens:
        arrays = {name: torch.from_numpy(a.copy()) for name, a in step_arrays(batch, table).items()}
        pages = torch.from_numpy(table.block_table_RP.copy())
        read = launch(batch, table)
        steps.append(RecordedStep(arrays, pages, hidden[-1], read().token_id_N.tolist()))
        return read

    runner._model.forward = forwarded  # type: ignore[method-assign]
    runner.launch = launched  # type: ignore[method-assign]
    harness.run()
    return steps[:STEPS]


class Rank:
    """One rank's part of the model, pool and adapters, on the interpreter."""

    def __init__(
        self, images: ImageHarness, adapters: dict[int, bytes], rank: int, talk: TurnCollectives
    ) -> None:
        self._base_model = base_model = images._base_model
        layout = images.config.page_layout(base_model, rank)
        self._pool = allocate_pool(KV_PAGES + 400, layout, CPU)
        self._memory = DirectAdapterMemory(self._pool, max_rank=MAX_RANK)
        free_page = KV_PAGES
        for slot, version in adapters.items():
            whole = images.image(version)
            image = [whole, *whole.of_other_ranks()][rank]
            pages = list(range(free_page, free_page + image.pages))
            free_page += image.pages
            self._memory.map(image)
            self._memory.begin_load(Adapter(version, image=image, slot=slot, pages=pages))
        reader = CheckpointReader(base_model, torch.float32, CPU)
        part = Partition(layout).vocabulary(base_model.vocab_size)
        self._model = Decoder(
            load_weights(base_model, reader, Partition(layout)),
            SplitVocabulary(part, talk),
            SeparateSums(talk),
        )
        self._vocabulary = SplitDeviceVocabulary(part, talk)
        self._lora = lora_sharing(layout, talk, max_rank=MAX_RANK)

    def check(self, step: RecordedStep) -> None:
        x_TH = self._model.forward(step.arrays["token_id"], self._operations(step))
        torch.testing.assert_close(x_TH, step.hidden_TH, rtol=1e-3, atol=1e-3)
        noise = Noise(*(step.arrays[name] for name in NOISE))
        logits_NV = self._model.logits(x_TH[step.arrays["sample_row"]])
        token_N = torch.empty(len(logits_NV), dtype=torch.int64)
        self._vocabulary.draw(logits_NV, noise, token_N)
        assert token_N.tolist() == step.token_N
        whole_NV = self._vocabulary.whole(logits_NV)
        assert whole_NV.shape[1] == self._base_model.vocab_size
        is_greedy = noise.temperature_N == 0
        assert whole_NV.argmax(dim=1)[is_greedy].tolist() == token_N[is_greedy].tolist()

    def _operations(self, step: RecordedStep) -> TritonOperations:
        rows = {name: values.int() for name, values in step.arrays.items()}
        options = self._base_model.options
        state = allocate_device_state(
            self._pool,
            self._memory.tables,
            step.block_table_RP.int(),
            rope_table(self._base_model),
            options,
            lora=self._lora,
            max_rows=len(rows["slot"]),
        )
        return TritonOperations(
            state,
            position_T=rows["position"],
            page_T=rows["page"],
            sequence_T=rows["sequence"],
            slot_T=rows["slot"],
            groups=LoraGroups.ALL,
        )


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize(("size", "strategy"), [(2, "replicated"), (4, "slora")])
def test_steps_of_ranks_have_the_hidden_states_and_tokens_of_one(
    tmp_path: Path, size: int, strategy: str
) -> None:
    model = make_model(tmp_path / "model", model_type="llama", num_hidden_layers=1, vocab_size=321)
    made = {
        rank: make_adapter(tmp_path / str(rank), model, seed=rank, r=rank, target_modules=targets)
        for rank, targets in {
            3: "all-linear",
            9: ["q_proj", "v_proj", "o_proj", "up_proj"],
        }.items()
    }
    alone = EngineHarness(
        model, tmp_path, pool_pages=KV_PAGES - 1, max_running=8, step_tokens=24, max_rank=MAX_RANK
    )
    for length, adapter in ((5, made[3]), (9, made[9]), (4, None), (1, made[9])):
        temperature = 0.8 * (length % 2)
        alone.submit(list(range(3, 3 + length)), adapter, max_tokens=4, temperature=temperature)
    steps = record(alone)
    assert any(np.diff(step.arrays["slot"]).any() for step in steps)
    slots = {
        adapter.slot: adapter.version
        for adapter in alone.engine.scheduler.residency
        if adapter.slot is not None
    }
    images = ImageHarness(
        model, tmp_path, tensor_parallel=size, lora_strategy=strategy, max_rank=MAX_RANK
    )
    for adapter in made.values():
        images.version_of(adapter)

    @torch.inference_mode()
    def of_rank(rank: int, talk: TurnCollectives) -> None:
        one = Rank(images, slots, rank, talk)
        for step in steps:
            one.check(step)

    Turns(size).run(of_rank)
