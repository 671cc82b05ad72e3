"""Builds an engine: weights, pool, scheduler and the runner of its device."""

import logging

import torch

from lorry.kernels.page_layout import PageLayout
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView, allocate_pool
from lorry.rpc.base_model import BaseModel
from lorry.worker.config import EngineConfig
from lorry.worker.cuda_runner import CudaRunner
from lorry.worker.device_memory import (
    GpuMemory,
    StepLimits,
    check_pool_pages,
    default_pool_pages,
    memory_needs,
)
from lorry.worker.engine import Engine
from lorry.worker.model import Decoder
from lorry.worker.pool import PagePool
from lorry.worker.progress import logged
from lorry.worker.runner import Runner
from lorry.worker.scheduler import Scheduler, SchedulerLimits
from lorry.worker.sequences import SequenceTable
from lorry.worker.torch_runner import TorchRunner
from lorry.worker.weights import CheckpointReader, RandomWeights, WeightReader, load_weights

log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, base_model: BaseModel) -> Engine:
    """Load the model, allocate the pool, and on a GPU capture all steps; logs what takes long.

    Raises PoolDoesNotFit before anything large is allocated.
    """
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    layout = PageLayout(geometry=base_model.geometry, dtype=config.page_dtype)
    limits = SchedulerLimits(
        step_tokens=max(config.step_tokens, config.max_running),
        max_running=config.max_running,
        max_context_tokens=config.max_context_tokens or base_model.max_context_tokens,
        prefix_cache=config.prefix_cache,
    )
    pool_pages = _pool_pages(config, base_model, layout, limits)
    with logged(log, "loaded the weights"):
        weights = load_weights(base_model, _weight_reader(config, base_model, device))
        model = Decoder(weights, base_model.geometry)
    with logged(log, f"allocated a pool of {pool_pages} pages of {layout.page_bytes} bytes"):
        pool = allocate_pool(pool_pages + 1, layout, device)  # with the dummy page
        table = SequenceTable(config.max_running, limits.max_context_tokens, layout.page_tokens)
        scheduler = Scheduler(limits, PagePool(pool.num_pages), table)
    with logged(log, "prepared the steps"):
        runner = _runner(config, base_model, model, pool, limits)
    return Engine(runner, scheduler)


def _pool_pages(
    config: EngineConfig, base_model: BaseModel, layout: PageLayout, limits: SchedulerLimits
) -> int:
    if config.device == "cpu":
        if config.pool_pages is None:
            raise ValueError("pool_pages is required on the CPU")
        return config.pool_pages
    steps = StepLimits(
        max_rows=limits.step_tokens,
        max_samples=limits.max_running,
        max_context_tokens=limits.max_context_tokens,
    )
    needs = memory_needs(base_model, layout, steps, max_rank=config.max_rank)
    with logged(log, "opened the GPU"):
        torch.cuda.empty_cache()
        memory = GpuMemory(*torch.cuda.mem_get_info())
    if config.pool_pages is None:
        return default_pool_pages(memory, needs, config.memory_fraction)
    check_pool_pages(memory, needs, config.pool_pages)
    return config.pool_pages


def _weight_reader(
    config: EngineConfig, base_model: BaseModel, device: torch.device
) -> WeightReader:
    dtype = TORCH_DTYPES[config.page_dtype]
    if config.load_format == "dummy":
        return RandomWeights(dtype, device)
    return CheckpointReader(base_model, dtype, device)


def _runner(
    config: EngineConfig,
    base_model: BaseModel,
    model: Decoder,
    pool: PoolView,
    limits: SchedulerLimits,
) -> Runner:
    if config.device == "cpu":
        return TorchRunner(
            base_model,
            model,
            pool,
            max_rank=config.max_rank,
            max_running=limits.max_running,
        )
    return CudaRunner(
        base_model,
        model,
        pool,
        max_rank=config.max_rank,
        max_rows=limits.step_tokens,
        max_running=limits.max_running,
        max_context_tokens=limits.max_context_tokens,
    )
