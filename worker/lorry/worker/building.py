"""Builds an engine: weights, pool, scheduler and the runner of its device."""

import torch

from lorry.kernels.page_layout import PageLayout
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView, allocate_pool
from lorry.rpc.base_model import BaseModel
from lorry.worker.config import EngineConfig
from lorry.worker.cuda_runner import CudaRunner
from lorry.worker.engine import Engine
from lorry.worker.model import LlamaModel
from lorry.worker.pool import PagePool
from lorry.worker.runner import Runner
from lorry.worker.scheduler import Scheduler, SchedulerLimits
from lorry.worker.sequences import SequenceTable
from lorry.worker.torch_runner import TorchRunner
from lorry.worker.weights import CheckpointReader, RandomWeights, WeightReader, load_weights


def build_engine(config: EngineConfig, base_model: BaseModel) -> Engine:
    """Load the model and allocate the pool; the dummy page comes on top of `pool_pages`."""
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    layout = PageLayout(geometry=base_model.geometry, dtype=config.page_dtype)
    weights = load_weights(base_model, _weight_reader(config, base_model, device))
    model = LlamaModel(weights, base_model.geometry)
    pool = allocate_pool(config.pool_pages + 1, layout, device)
    limits = SchedulerLimits(
        step_tokens=max(config.step_tokens, config.max_running),
        max_running=config.max_running,
        max_context_tokens=config.max_context_tokens or base_model.max_context_tokens,
    )
    table = SequenceTable(config.max_running, limits.max_context_tokens, layout.page_tokens)
    scheduler = Scheduler(limits, PagePool(pool.num_pages), table)
    return Engine(_runner(config, base_model, model, pool, limits), scheduler)


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
    model: LlamaModel,
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
