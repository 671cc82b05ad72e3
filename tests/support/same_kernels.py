"""Compile batch-invariant steps of several numbers of rows for sm_90; print their code, as JSON.

Run as a module without TRITON_INTERPRET, whose kernels cannot be compiled.
"""

import hashlib
import json
from functools import partial

import torch

from benchmarks.building import CONFIGS
from lorry.kernels.lora import AdapterTables
from lorry.kernels.page_layout import MODULES, Dtype, PageLayout
from lorry.kernels.partition import Partition
from lorry.kernels.pool_view import allocate_pool
from lorry.rpc.base_model import read_base_model
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.lora_sharing import OwnProducts
from lorry.worker.model import Decoder
from lorry.worker.row_sums import NoSums
from lorry.worker.triton_operations import DeviceState, TritonOperations, allocate_device_state
from lorry.worker.vocabulary import WholeVocabulary
from lorry.worker.weights import RandomWeights, load_weights
from tests.support.sm90 import compiling

MODEL = "llama-3-8b"
ROWS = (1, 2, 24, 1024)
PLANS = "_plan_kernel"  # sum nothing
empty = partial(torch.empty, dtype=torch.int32, device="meta")


def run(rows: int, state: DeviceState, model: Decoder) -> None:
    """A layer and the head."""
    operations = TritonOperations(
        state,
        position_T=empty(rows),
        page_T=empty(rows),
        sequence_T=empty(rows),
        slot_T=empty(rows),
        groups=LoraGroups.ALL,
    )
    model.logits(model.forward(empty(rows, dtype=torch.int64), operations))


def main() -> None:
    base_model, device = read_base_model(CONFIGS / MODEL), torch.device("meta")
    layout = PageLayout(geometry=base_model.geometry, dtype=Dtype.BF16)
    reader = RandomWeights(torch.bfloat16, device)
    weights = load_weights(base_model, reader, Partition(layout))
    offset = empty(64, len(MODULES))
    scale = empty(64, layout.geometry.layers, len(MODULES), dtype=torch.float32)
    state = allocate_device_state(
        allocate_pool(64, layout, device),
        AdapterTables(empty(64, 640), empty(64), offset, offset, scale),
        empty(512, 256),
        empty(8192, 2, layout.geometry.head_dim, dtype=torch.bfloat16),
        base_model.options,
        lora=OwnProducts(),
        max_rows=max(ROWS),
        batch_invariant=True,
    )
    vocabulary = WholeVocabulary(base_model.vocab_size)
    decoder = Decoder(weights, vocabulary, NoSums())
    model = decoder.first_layer().with_product(state.product)
    report = {}
    for rows in ROWS:
        with torch.inference_mode(), compiling() as kernels:
            run(rows, state, model)
        code = {(k.name, hashlib.sha256(k.cubin).hexdigest()) for k in kernels if k.name != PLANS}
        report[rows] = sorted(code)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
