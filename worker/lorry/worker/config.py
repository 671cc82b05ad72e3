"""Options of the worker, and what of them the engine process needs."""

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Annotated, Literal

import cyclopts

from lorry.kernels.page_layout import MAX_RANK, Dtype, PageLayout, TpStrategy
from lorry.rpc.base_model import BaseModel
from lorry.rpc.command import check_not_negative, check_positive
from lorry.rpc.service_config import DTYPES, CallingServiceConfig, DtypeName
from lorry.rpc.shared_memory import SHM_DIR

Device = Literal["cpu", "cuda"]
LoraStrategyName = Literal["replicated", "slora"]
LoadFormat = Literal["safetensors", "dummy"]
NATIVE_DTYPE: dict[Device, DtypeName] = {"cpu": "fp32", "cuda": "bf16"}
STEP_TOKENS: dict[Device, int] = {"cpu": 256, "cuda": 1024}
MAX_RUNNING = 512
CPU_POOL_BYTES = 512 << 20
MEMORY_FRACTION = 0.9


def page_layout(
    base_model: BaseModel, dtype: Dtype, size: int, rank: int, strategy: LoraStrategyName
) -> PageLayout:
    """Of the pool of one of `size` tensor-parallel ranks."""
    return PageLayout(
        geometry=base_model.geometry,
        dtype=dtype,
        tp_size=size,
        tp_rank=rank,
        tp_strategy=TpStrategy(strategy) if size > 1 else None,
    )


def check_batch_invariant(device: Device, tensor_parallel: int) -> None:
    """Raise ValueError for what cannot keep the promise.

    The products of a CPU's library, and sums over ranks, go by the number of rows.
    """
    if device != "cuda":
        raise ValueError(f"batch_invariant needs device cuda, got {device}")
    if tensor_parallel > 1:
        raise ValueError(f"batch_invariant needs tensor_parallel 1, got {tensor_parallel}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine process is told, every choice made; `Config` explains the fields."""

    model: Path
    load_format: LoadFormat = "safetensors"
    device: Device = "cpu"
    dtype: DtypeName = "fp32"
    pool_pages: int | None  # the dummy page not counted; None, on a GPU: by memory_fraction
    memory_fraction: float = MEMORY_FRACTION
    max_running: int = STEP_TOKENS["cpu"]
    step_tokens: int = STEP_TOKENS["cpu"]  # at least max_running: a step has a row of each
    max_rank: int = MAX_RANK
    max_context_tokens: int | None = None  # None: the model's
    threads: int = 1
    prefix_cache: bool = True
    tensor_parallel: int = 1
    lora_strategy: LoraStrategyName = "replicated"
    one_shot_sums: bool = True
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.batch_invariant:
            check_batch_invariant(self.device, self.tensor_parallel)

    @property
    def page_dtype(self) -> Dtype:
        return DTYPES[self.dtype]

    def page_layout(self, base_model: BaseModel, rank: int = 0) -> PageLayout:
        """Of a tensor-parallel rank's pool."""
        return page_layout(
            base_model, self.page_dtype, self.tensor_parallel, rank, self.lora_strategy
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "EngineConfig":
        fields = json.loads(text)
        return cls(**fields | {"model": Path(fields["model"])})


@cyclopts.Parameter(name="*", negative="")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(CallingServiceConfig):
    address: str = "127.0.0.1:50053"

    load_format: LoadFormat = "safetensors"
    """Whether to read the weights, or to make random ones of the model's shape for benchmarks."""

    store: str = "127.0.0.1:50052"
    """HOST:PORT of the adapter store."""

    shm_dir: Path = SHM_DIR
    """Where the adapter store of this machine keeps page images, as this process sees it."""

    local_dir: Path = Path(f"/dev/shm/lorry-worker-{os.geteuid()}")
    """Where the workers of this machine keep page images that came in chunks."""

    worker_id: str = dataclasses.field(default_factory=socket.gethostname)
    """Name of this worker in the routers' logs."""

    device: Device = "cpu"
    """Where the engine computes."""

    dtype: DtypeName | None = None
    """Type of weights, KV cache and adapters; by default fp32 on the CPU and bf16 on a GPU."""

    tensor_parallel: int = 1
    """Processes that share the model, each with a part of every layer, and on GPUs each with one of
    its own. It must divide the model's KV heads or be a multiple of their number."""

    lora_strategy: LoraStrategyName = "replicated"
    """How tensor-parallel processes share adapters: `replicated` keeps A of q, k, v, gate and up
    and B of o and down in each, and communicates nothing more than the base model; `slora` keeps
    no weight twice, and communicates the products with A."""

    one_shot_sums: Annotated[bool, cyclopts.Parameter(negative="--no-one-shot-sums")] = True
    """Whether tensor-parallel processes on GPUs that read each other's memory add small sums in one
    kernel; without, all sums are NCCL's."""

    pool_bytes: int | None = None
    """Memory for KV cache and adapters together, in each tensor-parallel process; by default 512
    MiB on the CPU, and on a GPU what memory_fraction leaves."""

    pool_pages: int | None = None
    """The same as a number of pages, of 16 tokens of KV each; instead of pool_bytes."""

    memory_fraction: float = MEMORY_FRACTION
    """Share of a GPU's memory that may be in use, by this worker and others, where neither
    pool_bytes nor pool_pages is given."""

    max_running: int | None = None
    """Sequences that may run at the same time; by default 512, and at most step_tokens."""

    max_waiting: int = 64
    """Requests that a router may have sent beyond max_running."""

    step_tokens: int | None = None
    """Tokens that one step computes at most; by default 256 on the CPU and 1024 on a GPU."""

    max_rank: int = MAX_RANK
    """Largest rank of an adapter."""

    max_context_tokens: int | None = None
    """Tokens of prompt and output together; by default, and at most, what the model allows."""

    threads: int | None = None
    """CPU threads of each of the engine's processes; by default half of the cores together, since
    the others serve."""

    prefix_cache: Annotated[bool, cyclopts.Parameter(negative="--no-prefix-cache")] = True
    """Whether a request takes KV pages of earlier ones of its tenant and adapter version that
    begin with the same tokens, instead of computing them again."""

    batch_invariant: bool = False
    """Whether a request's tokens and logprobs are the same, to the bit, whatever else runs, however
    its prompt is cut into steps, and after preemption: by slower products and attention. Only on a
    GPU, and by one process."""

    max_fetches: int = 8
    """Page images that are fetched from the adapter store at the same time."""

    copied_image_bytes: int = 4 << 30
    """Memory for page images of a store on another host, kept for loading them again."""

    fetch_timeout_s: float = 30.0
    """Seconds that the fetch of a page image may take: its turn, attempts and pauses together."""

    start_timeout_s: float = 600.0
    """Seconds that the engine may take to load the model."""

    engine_silence_s: float = 30.0
    """Seconds without a sign of life after which the engine is killed, and this worker ends."""

    grace_s: float = 30.0
    """Seconds that running requests get to finish on SIGTERM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self,
            "pool_bytes",
            "pool_pages",
            "max_running",
            "step_tokens",
            "max_context_tokens",
            "threads",
            "tensor_parallel",
            "max_fetches",
            "copied_image_bytes",
            "fetch_timeout_s",
            "start_timeout_s",
            "engine_silence_s",
        )
        check_not_negative(self, "max_waiting", "grace_s")
        if not 1 <= self.max_rank <= MAX_RANK:
            raise ValueError(f"max_rank must be in [1, {MAX_RANK}], got {self.max_rank}")
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction must be in (0, 1], got {self.memory_fraction}")
        if self.batch_invariant:
            check_batch_invariant(self.device, self.tensor_parallel)
        if not self.worker_id:
            raise ValueError("worker_id must not be empty")

    def page_layout(self, base_model: BaseModel, rank: int = 0) -> PageLayout:
        """Of a tensor-parallel rank's pool; raises ValueError if ranks cannot share the heads."""
        return page_layout(
            base_model,
            DTYPES[self.dtype or NATIVE_DTYPE[self.device]],
            self.tensor_parallel,
            rank,
            self.lora_strategy,
        )

    def page_layouts(self, base_model: BaseModel) -> list[PageLayout]:
        """Of all ranks."""
        return [self.page_layout(base_model, rank) for rank in range(self.tensor_parallel)]

    def engine(self, base_model: BaseModel) -> EngineConfig:
        """What to tell the engine; raises ValueError for a pool or a step that is too small."""
        step_tokens = self.step_tokens or STEP_TOKENS[self.device]
        max_running = self.max_running or min(MAX_RUNNING, step_tokens)
        if max_running > step_tokens:
            raise ValueError(f"max_running {max_running} exceeds step_tokens {step_tokens}")
        context = min(
            self.max_context_tokens or base_model.max_context_tokens, base_model.max_context_tokens
        )
        return EngineConfig(
            model=self.model,
            load_format=self.load_format,
            device=self.device,
            dtype=self.dtype or NATIVE_DTYPE[self.device],
            pool_pages=self._pool_pages(base_model),
            memory_fraction=self.memory_fraction,
            max_running=max_running,
            step_tokens=step_tokens,
            max_rank=self.max_rank,
            max_context_tokens=context,
            threads=self.threads or max(1, (os.cpu_count() or 1) // (2 * self.tensor_parallel)),
            prefix_cache=self.prefix_cache,
            tensor_parallel=self.tensor_parallel,
            lora_strategy=self.lora_strategy,
            one_shot_sums=self.one_shot_sums,
            batch_invariant=self.batch_invariant,
        )

    def _pool_pages(self, base_model: BaseModel) -> int | None:
        pool_bytes = self.pool_bytes
        if pool_bytes is None and self.device == "cpu":
            pool_bytes = CPU_POOL_BYTES
        if self.pool_pages or pool_bytes is None:
            return self.pool_pages
        page_bytes = self.page_layout(base_model).page_bytes
        if pool_bytes < page_bytes:
            raise ValueError(f"pool_bytes {pool_bytes} holds no page of {page_bytes} bytes")
        return pool_bytes // page_bytes
