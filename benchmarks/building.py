"""The engine that a benchmark's options describe, with random weights."""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.results_file import RESULTS
from lorry.kernels.page_layout import PageLayout, TpStrategy
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.service_config import DTYPES
from lorry.worker.building import Ranks, build_engine
from lorry.worker.config import MEMORY_FRACTION, EngineConfig
from lorry.worker.engine import Engine

CONFIGS = Path(__file__).parent / "models"
GIB = 1 << 30
WEIGHTS_SEED = 0  # so that a run of a benchmark draws the tokens that the last one drew


def engine_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of the engine and of the result file."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--model", default="llama-3-8b", help="a directory of benchmarks/models")
    result.add_argument("--ranks", type=int, nargs="+", default=[16], help="cycled over adapters")
    result.add_argument("--pool-gib", type=float, help="default: what the GPU has room for")
    result.add_argument("--step-tokens", type=int, default=1024)
    result.add_argument("--max-running", type=int, default=512)
    result.add_argument("--max-context-tokens", type=int, default=4096)
    result.add_argument("--prefix-cache", action="store_true", help="switch it on")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result files")
    result.add_argument("--commit", help="where the tree came without its history")
    return result


def build(
    arguments: argparse.Namespace,
    base_model: BaseModel,
    layout: PageLayout,
    *,
    memory_fraction: float = MEMORY_FRACTION,
) -> tuple[Engine, EngineConfig]:
    """`memory_fraction` of a GPU is in use afterwards, where no size of the pool is asked for."""
    config = engine_config(arguments, base_model, layout, memory_fraction=memory_fraction)
    return built(config, base_model), config


def engine_config(
    arguments: argparse.Namespace,
    base_model: BaseModel,
    layout: PageLayout,
    *,
    memory_fraction: float = MEMORY_FRACTION,
) -> EngineConfig:
    return EngineConfig(
        model=base_model.directory,
        load_format="dummy",
        device=arguments.device,
        dtype=arguments.dtype,
        pool_pages=_pool_pages(arguments.pool_gib, layout),
        memory_fraction=memory_fraction,
        max_running=arguments.max_running,
        step_tokens=arguments.step_tokens,
        max_rank=max(64, *arguments.ranks),
        max_context_tokens=arguments.max_context_tokens,
        prefix_cache=arguments.prefix_cache,
        tensor_parallel=layout.tp_size,
        lora_strategy="slora" if layout.tp_strategy is TpStrategy.SLORA else "replicated",
    )


def built(config: EngineConfig, base_model: BaseModel, ranks: Ranks | None = None) -> Engine:
    torch.manual_seed(WEIGHTS_SEED)
    started_s = time.perf_counter()
    engine = build_engine(config, base_model, ranks)
    print(f"engine built in {time.perf_counter() - started_s:.1f} s", flush=True)
    return engine


def _pool_pages(pool_gib: float | None, layout: PageLayout) -> int | None:
    return None if pool_gib is None else int(pool_gib * GIB) // layout.page_bytes


def pool_gib(engine: Engine, layout: PageLayout) -> float:
    """The size of the engine's pool."""
    return engine.scheduler.pool.total * layout.page_bytes / GIB


def model_of(arguments: argparse.Namespace) -> tuple[BaseModel, PageLayout]:
    base_model = read_base_model(CONFIGS / arguments.model)
    return base_model, PageLayout(geometry=base_model.geometry, dtype=DTYPES[arguments.dtype])


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"
