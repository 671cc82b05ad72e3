"""How many pages a GPU has room for, computed before anything large is allocated."""

from dataclasses import dataclass

import torch

from lorry.kernels.launch_settings import split_setting
from lorry.kernels.page_layout import PageLayout
from lorry.kernels.partition import Partition
from lorry.kernels.pool_view import TORCH_DTYPES
from lorry.kernels.split_plan import partials_bytes
from lorry.rpc.base_model import BaseModel
from lorry.worker.adapter_tables import slot_bytes
from lorry.worker.buckets import bucket_sizes
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.prompt_head import piece_rows
from lorry.worker.sequence_adjustments import table_bytes
from lorry.worker.step_arrays import HeadKind
from lorry.worker.weights import num_weights

# By default there are no more: tables and host lists grow with them, and 4 million tokens of KV
# are more than most can use. `pool_pages` may ask for more.
MOST_DEFAULT_PAGES = 1 << 18

# Upper bounds; what capture took is logged beside their sum.
FIXED_BYTES = 1 << 30  # code of kernels, workspaces of matrix products, work lists
GRAPH_BYTES = 8 << 20  # of a graph's nodes in the driver
LOGIT_BYTES = 6  # of what the sampler makes of a logit
COLLECTIVES_BYTES = 1 << 30  # of NCCL's buffers and channels
ACTIVATION_COPIES = 2  # of the run before a capture, and in the graphs' own memory


class PoolDoesNotFit(ValueError):
    """The pool leaves no room for the weights, or for the steps."""


class NoSuchGpu(ValueError):
    """The machine has fewer GPUs than there are tensor-parallel ranks."""


def open_device(device: str, rank: int, size: int) -> torch.device:
    """The device of one of `size` tensor-parallel ranks; raises NoSuchGpu."""
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if size > count:
        raise NoSuchGpu(f"tensor_parallel {size} needs as many GPUs, and here are {count}")
    own = torch.device("cuda", rank)
    torch.cuda.set_device(own)
    return own


@dataclass(frozen=True, slots=True)
class GpuMemory:
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What an engine takes of a GPU's memory."""

    weights_bytes: int
    steps_bytes: int  # activations, buffers and graphs
    page_bytes: int  # of the pool
    slot_bytes: int  # of the adapter tables; there are as many slots as pages

    def pages_in(self, num_bytes: int) -> int:
        """Pages that fit into `num_bytes` beside weights and steps, the dummy page not counted."""
        left = num_bytes - self.weights_bytes - self.steps_bytes
        return max(0, left // (self.page_bytes + self.slot_bytes) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step for which graphs are captured."""

    max_rows: int
    max_samples: int
    max_context_tokens: int
    batch_invariant: bool = False


def memory_needs(
    base_model: BaseModel, layout: PageLayout, steps: StepLimits, *, max_rank: int
) -> MemoryNeeds:
    """What an engine for `base_model` takes; steps are bounded from above."""
    return MemoryNeeds(
        weights_bytes=num_weights(base_model, Partition(layout)) * layout.dtype.itemsize,
        steps_bytes=_steps_bytes(base_model, layout, steps),
        page_bytes=layout.page_bytes,
        slot_bytes=slot_bytes(layout, max_rank),
    )


def _steps_bytes(base_model: BaseModel, layout: PageLayout, steps: StepLimits) -> int:
    geometry, itemsize = base_model.geometry, layout.dtype.itemsize
    attention = (geometry.heads + geometry.kv_heads) * geometry.head_dim
    row_bytes = (6 * geometry.hidden + 2 * attention + 4 * geometry.intermediate) * itemsize
    sample_bytes = base_model.vocab_size * (itemsize + LOGIT_BYTES)
    if layout.tp_size > 1:
        sample_bytes += base_model.vocab_size * 2 * itemsize  # gathered, then brought in order
    most_samples = max(steps.max_samples, piece_rows(steps.max_rows))
    activations = steps.max_rows * row_bytes + most_samples * sample_bytes
    block_table = -(-steps.max_context_tokens // layout.page_tokens) * steps.max_samples * 4
    rope_table = base_model.max_context_tokens * 2 * geometry.head_dim * itemsize
    graphs = len(bucket_sizes(steps.max_rows)) * len(LoraGroups)
    graphs += len(bucket_sizes(steps.max_samples)) * len(HeadKind) + 1  # of prompts' logprobs
    return (
        FIXED_BYTES
        + (COLLECTIVES_BYTES if layout.tp_size > 1 else 0)
        + graphs * GRAPH_BYTES
        + ACTIVATION_COPIES * activations
        + block_table
        + rope_table
        + table_bytes(steps.max_samples, base_model.vocab_size)
        + (_partials_bytes(layout, steps.max_rows) if steps.batch_invariant else 0)
    )


def _partials_bytes(layout: PageLayout, max_rows: int) -> int:
    geometry = layout.local_geometry
    setting = split_setting(TORCH_DTYPES[layout.dtype], geometry.heads // geometry.kv_heads)
    return partials_bytes(
        setting, max_rows=max_rows, heads=geometry.heads, head_dim=geometry.head_dim
    )


def default_pool_pages(memory: GpuMemory, needs: MemoryNeeds, memory_fraction: float) -> int:
    """Pages with which `memory_fraction` of the GPU's memory is in use; raises PoolDoesNotFit."""
    reserve = int((1 - memory_fraction) * memory.total_bytes)
    pages = min(needs.pages_in(memory.free_bytes - reserve), MOST_DEFAULT_PAGES)
    if not pages:
        raise PoolDoesNotFit(
            f"memory_fraction {memory_fraction:g} leaves no room for a pool: the GPU has "
            f"{_gib(memory.free_bytes)} free of {_gib(memory.total_bytes)}, {_others(needs)}"
        )
    return pages


def check_pool_pages(memory: GpuMemory, needs: MemoryNeeds, pool_pages: int) -> None:
    """Raise PoolDoesNotFit, which says what would fit, if `pool_pages` pages do not."""
    most = needs.pages_in(memory.free_bytes)
    if pool_pages <= most:
        return
    fits = f"at most pool_pages {most} (pool_bytes {most * needs.page_bytes}) fits"
    raise PoolDoesNotFit(
        f"pool_pages {pool_pages} ({_gib(pool_pages * needs.page_bytes)}) does not fit: the GPU "
        f"has {_gib(memory.free_bytes)} free, {_others(needs)}; "
        f"{fits if most else 'no page fits beside them'}"
    )


def _others(needs: MemoryNeeds) -> str:
    return (
        f"weights take {_gib(needs.weights_bytes)}, steps and graphs {_gib(needs.steps_bytes)} "
        f"and adapter tables {needs.slot_bytes} bytes a page"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
