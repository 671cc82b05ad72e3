"""An engine of real size begins within the memory that was counted, its kernels made ahead."""

import dataclasses
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from triton import knobs

from lorry.kernels.activation import swiglu
from lorry.kernels.compilation import compile_ahead
from lorry.kernels.page_layout import MAX_RANK, PageLayout
from lorry.rpc.base_model import read_base_model
from lorry.worker import messages as m
from lorry.worker.building import build_engine
from lorry.worker.config import EngineConfig
from lorry.worker.cuda_runner import CudaRunner
from lorry.worker.device_memory import MemoryNeeds, PoolDoesNotFit, StepLimits, memory_needs
from lorry.worker.engine import Engine
from tests.support.command import REPO

GIB = 1 << 30
CONFIG = EngineConfig(
    model=REPO / "benchmarks" / "models" / "llama-3-8b",
    load_format="dummy",
    device="cuda",
    dtype="bf16",
    pool_pages=1 << 40,
    max_running=512,
    step_tokens=1024,
    max_context_tokens=8192,
)


class Built(NamedTuple):
    """An engine with the largest pool that is accepted."""

    engine: Engine
    needs: MemoryNeeds
    taken_bytes: int
    compiled_late: list[str]  # kernels, one after the other while graphs were captured


@pytest.fixture(scope="module")
def built(gpu: torch.device) -> Iterator[Built]:
    base_model = read_base_model(CONFIG.model)
    with pytest.raises(PoolDoesNotFit) as refused:
        build_engine(CONFIG, base_model)
    found = re.search(r"at most pool_pages (\d+)", str(refused.value))
    assert found is not None
    compiled_late: list[str] = []

    def note(*, fn, **_) -> None:
        if threading.current_thread() is threading.main_thread():
            compiled_late.append(fn.name)

    before, _ = torch.cuda.mem_get_info(gpu)
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = note
        engine = build_engine(dataclasses.replace(CONFIG, pool_pages=int(found[1])), base_model)
    after, _ = torch.cuda.mem_get_info(gpu)
    steps = StepLimits(max_rows=1024, max_samples=512, max_context_tokens=8192)
    layout = PageLayout(geometry=base_model.geometry, dtype=CONFIG.page_dtype)
    needs = memory_needs(base_model, layout, steps, max_rank=MAX_RANK)
    yield Built(engine, needs, before - after, compiled_late)
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    runner.adapters.pool.slices.untyped_storage().resize_(0)  # other tests need the GPU, too
    torch.cuda.empty_cache()


def test_steps_and_graphs_take_no_more_than_was_counted(built: Built) -> None:
    pages = built.engine.scheduler.pool.total + 1
    needs = built.needs
    others = needs.weights_bytes + pages * (needs.page_bytes + needs.slot_bytes)
    steps_bytes = built.taken_bytes - others
    print(f"steps: {steps_bytes / GIB:.2f} GiB of {needs.steps_bytes / GIB:.2f} GiB counted")
    assert steps_bytes <= needs.steps_bytes


def test_every_kernel_is_compiled_ahead_of_the_capture(built: Built) -> None:
    assert built.compiled_late == []


def test_the_largest_pool_serves(built: Built) -> None:
    submit = m.Submit(
        request=1,
        tenant="default",
        version=b"",
        token_ids=list(range(3, 1500)),
        generated_tokens=0,
        max_tokens=20,
        min_tokens=20,
        stop_token_ids=[],
        temperature=0.0,
        seed=1,
        remaining_s=None,
    )
    built.engine.handle([submit])
    events: list[m.Event] = []
    for _ in range(100):
        built.engine.step()
        events += built.engine.take_events()
    assert sum(len(event.token_ids) for event in events if isinstance(event, m.StepTokens)) == 20


def test_nothing_runs_while_kernels_are_compiled_ahead(gpu: torch.device) -> None:
    """Not even a kernel that was compiled before: its input may not have been computed."""
    gate, up, out = torch.ones(3, 8, 64, device=gpu)
    swiglu(gate, up, out)
    out.fill_(7)
    with ThreadPoolExecutor(1) as threads:
        assert not compile_ahead(lambda: swiglu(gate, up, out), threads)
    assert bool((out == 7).all())
