"""Builds an engine: weights, pool, scheduler and the runner of its device."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorry.kernels.page_layout import PageLayout
from lorry.kernels.partition import Partition
from lorry.kernels.pool_view import TORCH_DTYPES, allocate_pool
from lorry.rpc.base_model import BaseModel
from lorry.worker.collectives import Alone, Collectives
from lorry.worker.config import EngineConfig
from lorry.worker.cuda_runner import CudaRunner
from lorry.worker.device_memory import (
    GpuMemory,
    StepLimits,
    check_pool_pages,
    default_pool_pages,
    memory_needs,
    open_device,
)
from lorry.worker.device_vocabulary import (
    DeviceVocabulary,
    SplitDeviceVocabulary,
    WholeDeviceVocabulary,
)
from lorry.worker.engine import Engine
from lorry.worker.following_rank import FollowingRank
from lorry.worker.leading_runner import LeadingRunner, RankLink
from lorry.worker.lora_sharing import lora_sharing
from lorry.worker.lora_strategies import lora_strategy
from lorry.worker.model import Decoder
from lorry.worker.pool import PagePool
from lorry.worker.progress import logged
from lorry.worker.row_sums import row_sums
from lorry.worker.runner import RankRunner
from lorry.worker.scheduler import Scheduler
from lorry.worker.scheduler_limits import SchedulerLimits
from lorry.worker.sequences import SequenceTable
from lorry.worker.torch_runner import TorchRunner
from lorry.worker.vocabulary import SplitVocabulary, Vocabulary, WholeVocabulary
from lorry.worker.weights import CheckpointReader, RandomWeights, WeightReader, load_weights

log = logging.getLogger(__name__)


class Ranks(NamedTuple):
    """What the first of several tensor-parallel ranks needs of the others."""

    links: Sequence[RankLink]
    collectives: Collectives


def build_engine(config: EngineConfig, base_model: BaseModel, ranks: Ranks | None = None) -> Engine:
    """Load the model, allocate the pool, and on a GPU capture all steps; logs what takes long.

    With `ranks`, this one's part of the model. Raises PoolDoesNotFit before anything large is
    allocated.
    """
    limits = _limits(config, base_model)
    runner = _build_runner(config, base_model, limits, 0, ranks.collectives if ranks else Alone())
    pool = runner.adapters.pool
    table = SequenceTable(config.max_running, limits.max_context_tokens, pool.layout.page_tokens)
    scheduler = Scheduler(limits, PagePool(pool.num_pages), table)
    if ranks is None:
        return Engine(runner, scheduler)
    return Engine(LeadingRunner(runner, ranks.links), scheduler)


def build_following_rank(
    config: EngineConfig, base_model: BaseModel, rank: int, collectives: Collectives
) -> FollowingRank:
    """The same for a rank that schedules nothing."""
    limits = _limits(config, base_model)
    return FollowingRank(_build_runner(config, base_model, limits, rank, collectives))


def _limits(config: EngineConfig, base_model: BaseModel) -> SchedulerLimits:
    return SchedulerLimits(
        step_tokens=max(config.step_tokens, config.max_running),
        max_running=config.max_running,
        max_context_tokens=config.max_context_tokens or base_model.max_context_tokens,
        prefix_cache=config.prefix_cache,
    )


def _build_runner(
    config: EngineConfig,
    base_model: BaseModel,
    limits: SchedulerLimits,
    rank: int,
    collectives: Collectives,
) -> RankRunner:
    torch.set_num_threads(config.threads)
    device = open_device(config.device, rank, config.tensor_parallel)
    layout = config.page_layout(base_model, rank)
    sums = row_sums(
        collectives,
        layout,
        max_rows=limits.step_tokens,
        norm_epsilon=base_model.options.norm_epsilon,
    )
    own_pages = _pool_pages(config, base_model, layout, limits)
    pool_pages = _least(own_pages, device, collectives)
    vocabulary = _vocabulary(base_model, layout, collectives)
    with logged(log, "loaded the weights"):
        reader = _weight_reader(config, base_model, device)
        weights = load_weights(base_model, reader, Partition(layout))
        model = Decoder(weights, vocabulary, sums)
    with logged(log, f"allocated a pool of {pool_pages} pages of {layout.page_bytes} bytes"):
        pool = allocate_pool(pool_pages + 1, layout, device)  # with the dummy page
    with logged(log, "prepared the steps"):
        if config.device == "cpu":
            return TorchRunner(
                base_model,
                model,
                pool,
                vocabulary=vocabulary,
                lora=lora_strategy(layout, collectives),
                max_rank=config.max_rank,
                max_running=limits.max_running,
            )
        return CudaRunner(
            base_model,
            model,
            pool,
            vocabulary=_device_vocabulary(base_model, layout, collectives),
            lora=lora_sharing(layout, collectives, max_rank=config.max_rank),
            max_rank=config.max_rank,
            max_rows=limits.step_tokens,
            max_running=limits.max_running,
            max_context_tokens=limits.max_context_tokens,
            batch_invariant=config.batch_invariant,
        )


def _least(pool_pages: int, device: torch.device, collectives: Collectives) -> int:
    """Of all ranks: another rank's GPU may have less room."""
    return int(collectives.all_gather(torch.tensor(pool_pages, device=device)).min())


def _device_vocabulary(
    base_model: BaseModel, layout: PageLayout, collectives: Collectives
) -> DeviceVocabulary:
    if layout.tp_size == 1:
        return WholeDeviceVocabulary()
    return SplitDeviceVocabulary(Partition(layout).vocabulary(base_model.vocab_size), collectives)


def _vocabulary(base_model: BaseModel, layout: PageLayout, collectives: Collectives) -> Vocabulary:
    if layout.tp_size == 1:
        return WholeVocabulary(base_model.vocab_size)
    return SplitVocabulary(Partition(layout).vocabulary(base_model.vocab_size), collectives)


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
        batch_invariant=config.batch_invariant,
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
