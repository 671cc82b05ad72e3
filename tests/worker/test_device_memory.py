"""What fits on a GPU, decided before anything is allocated."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from lorry.kernels.page_layout import MAX_RANK, Dtype, PageLayout
from lorry.kernels.partition import Partition
from lorry.rpc.base_model import read_base_model
from lorry.worker.adapter_tables import TableBuffer, slot_bytes
from lorry.worker.config import Config
from lorry.worker.device_memory import (
    MOST_DEFAULT_PAGES,
    GpuMemory,
    PoolDoesNotFit,
    StepLimits,
    check_pool_pages,
    default_pool_pages,
    memory_needs,
)
from lorry.worker.sequence_adjustments import SequenceAdjustments, table_bytes
from lorry.worker.weights import LayerWeights, RandomWeights, load_weights, num_weights

GIB = 1 << 30
MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
H200 = GpuMemory(139 * GIB, 140 * GIB)
META = torch.device("meta")


@pytest.fixture(scope="module")
def base_model():
    return read_base_model(MODELS / "llama-3-8b")


@pytest.fixture(scope="module")
def needs(base_model):
    layout = PageLayout(geometry=base_model.geometry, dtype=Dtype.BF16)
    steps = StepLimits(max_rows=1024, max_samples=512, max_context_tokens=8192)
    return memory_needs(base_model, layout, steps, max_rank=MAX_RANK)


def taken(needs, pages):
    return (
        needs.weights_bytes
        + needs.steps_bytes
        + (pages + 1) * (needs.page_bytes + needs.slot_bytes)
    )


def test_the_default_pool_leaves_the_reserve_free_and_nothing_more(needs):
    pages = default_pool_pages(H200, needs, 0.9)
    left = H200.free_bytes - taken(needs, pages)
    reserve = H200.total_bytes // 10
    assert reserve <= left < reserve + 2 * needs.page_bytes


def test_what_others_use_makes_the_default_pool_smaller(needs):
    busy = dataclasses.replace(H200, free_bytes=H200.free_bytes - 20 * GIB)
    fewer = default_pool_pages(H200, needs, 0.9) - default_pool_pages(busy, needs, 0.9)
    assert fewer * (needs.page_bytes + needs.slot_bytes) == pytest.approx(20 * GIB, rel=0.001)


def test_a_gpu_without_room_for_a_pool_is_refused_with_its_numbers(needs):
    with pytest.raises(PoolDoesNotFit, match=r"memory_fraction 0\.9.* 20\.00 GiB free of 24\.00"):
        default_pool_pages(GpuMemory(20 * GIB, 24 * GIB), needs, 0.9)


def test_a_tiny_page_makes_no_endless_pool(needs):
    tiny = dataclasses.replace(needs, page_bytes=4096)
    assert default_pool_pages(H200, tiny, 0.9) == MOST_DEFAULT_PAGES


def test_a_pool_that_is_too_large_is_refused_with_the_largest_that_fits(needs):
    with pytest.raises(PoolDoesNotFit) as refused:
        check_pool_pages(H200, needs, 70_000)
    text = str(refused.value)
    assert "pool_pages 70000 (136.72 GiB) does not fit: the GPU has 139.00 GiB free" in text
    assert "weights take 14.96 GiB" in text
    found = re.search(r"at most pool_pages (\d+) \(pool_bytes (\d+)\) fits", text)
    assert found is not None
    most = int(found[1])
    assert int(found[2]) == most * needs.page_bytes
    check_pool_pages(H200, needs, most)
    with pytest.raises(PoolDoesNotFit):
        check_pool_pages(H200, needs, most + 1)


def test_a_model_that_is_too_large_is_refused_whatever_the_pool(needs):
    with pytest.raises(PoolDoesNotFit, match="no page fits beside them"):
        check_pool_pages(GpuMemory(15 * GIB, 16 * GIB), needs, 1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_counted_as_they_are_loaded(base_model, tied):
    model = dataclasses.replace(base_model, tie_embeddings=tied)
    layout = PageLayout(geometry=model.geometry, dtype=Dtype.BF16)
    loaded = load_weights(model, RandomWeights(torch.bfloat16, META), Partition(layout))
    names = [field.name for field in dataclasses.fields(LayerWeights)]
    parts = [getattr(layer, name) for layer in loaded.layers for name in names]
    groups = [part if isinstance(part, tuple) else (part,) for part in parts]
    tensors = [tensor for group in groups for tensor in group if tensor is not None]
    tensors += [loaded.embedding, loaded.norm, *([] if tied else [loaded.head])]
    assert num_weights(model, Partition(layout)) == sum(tensor.numel() for tensor in tensors)


def test_the_adapter_tables_are_counted_as_they_are_allocated(base_model):
    layout = PageLayout(geometry=base_model.geometry, dtype=Dtype.BF16)
    tables = TableBuffer(layout, num_slots=5000, max_rank=64, device=torch.device("cpu")).tables
    parts = [getattr(tables, field.name) for field in dataclasses.fields(tables)]
    assert sum(part.nbytes for part in parts) == 5000 * slot_bytes(layout, 64)


def test_the_tables_of_adjustments_are_counted_as_they_are_allocated():
    adjustments = SequenceAdjustments(5, 1000, META)
    assert adjustments._edits_RW.nbytes + adjustments.tables.count_RV.nbytes == table_bytes(5, 1000)


def test_only_a_gpu_worker_leaves_the_pool_to_its_engine(base_model):
    config = Config(model=MODELS / "llama-3-8b", load_format="dummy")
    assert config.engine(base_model).pool_pages == (512 << 20) // (4 << 20)  # fp32
    on_gpu = dataclasses.replace(config, device="cuda")
    assert on_gpu.engine(base_model).pool_pages is None
    given = dataclasses.replace(on_gpu, pool_bytes=GIB)
    assert given.engine(base_model).pool_pages == GIB // (2 << 20)


@pytest.mark.parametrize("fraction", [0.0, 1.01])
def test_a_fraction_beyond_the_gpu_is_refused(fraction):
    with pytest.raises(ValueError, match="memory_fraction must be in"):
        Config(model=MODELS, memory_fraction=fraction)
