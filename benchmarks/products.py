"""The time of a step's base products by its rows: what `benchmarks/roofline.py` reckons with.

    python -m benchmarks.products

The body is the products of all layers on every row of a step, the head the product with the
vocabulary on the rows that sample. Each is one CUDA graph over the very weights that the engine
loads, so that no layer finds another's in a cache; the graphs of all sizes take turns.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.building import CONFIGS, device_name
from benchmarks.results_file import RESULTS, write_result
from benchmarks.timing import interleaved_ms, replayable
from lorry.kernels.pool_view import TORCH_DTYPES
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.service_config import DTYPES
from lorry.worker.weights import ModelWeights, RandomWeights, load_weights

BODY_ROWS = [
    *(1, 2, 4, 8, 16, 32, 48),
    *range(64, 257, 32),
    *range(320, 1025, 64),
    *(1280, 1536, 2048),
]
HEAD_ROWS = [rows for rows in BODY_ROWS if rows <= 512]


def measure(model: str, arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Median milliseconds of body and head by their rows."""
    base_model, device = read_base_model(CONFIGS / model), torch.device(arguments.device)
    dtype = TORCH_DTYPES[DTYPES[arguments.dtype]]
    weights = load_weights(base_model, RandomWeights(dtype, device))
    most = max(arguments.rows)
    launches: dict[tuple[str, int], Callable[[], object]] = {}
    body = _Body(weights, base_model, most)
    for rows in arguments.rows:
        launches["body_ms", rows] = partial(body.run, rows)
        if rows <= max(HEAD_ROWS):
            launches["head_ms", rows] = partial(linear, body.x_TH[:rows], weights.head)
    times = interleaved_ms(replayable(launches, device), device, arguments.rounds)
    found: dict[str, dict[int, float]] = {"body_ms": {}, "head_ms": {}}
    for (part, rows), values in times.items():
        found[part][rows] = round(median(values), 4)
    return found


class _Body:
    """The products of all layers, on inputs of up to `most` rows that are random numbers."""

    def __init__(self, weights: ModelWeights, base_model: BaseModel, most: int) -> None:
        self._layers = weights.layers
        like, geometry = weights.head, base_model.geometry
        self.x_TH = _random(most, geometry.hidden, like)
        self._mixed_TQ = _random(most, geometry.heads * geometry.head_dim, like)
        self._product_TI = _random(most, geometry.intermediate, like)

    def run(self, rows: int) -> None:
        x_TH, mixed_TQ = self.x_TH[:rows], self._mixed_TQ[:rows]
        product_TI = self._product_TI[:rows]
        for layer in self._layers:
            linear(x_TH, layer.qkv)
            linear(mixed_TQ, layer.o)
            linear(x_TH, layer.gate_up)
            linear(product_TI, layer.down)


def _random(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows, width, dtype=like.dtype, device=like.device).normal_()


def _print_table(model: str, times: dict[str, dict[int, float]], base_model: BaseModel) -> None:
    print(f"{model}\n{'rows':>6} {'body ms':>9} {'TFLOP/s':>8} {'head ms':>9}")
    for rows, body_ms in times["body_ms"].items():
        tera_flops = 2 * _body_weights(base_model) * rows / body_ms / 1e9
        head_ms = times["head_ms"].get(rows)
        head = f"{head_ms:9.3f}" if head_ms is not None else ""
        print(f"{rows:6} {body_ms:9.3f} {tera_flops:8.1f} {head}", flush=True)


def _body_weights(base_model: BaseModel) -> int:
    geometry = base_model.geometry
    hidden, heads = geometry.hidden, geometry.heads * geometry.head_dim
    attention = hidden * (2 * heads + 2 * geometry.kv_heads * geometry.head_dim)
    return geometry.layers * (attention + 3 * hidden * geometry.intermediate)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument(
        "--model", nargs="+", default=["llama-2-7b", "llama-3-8b"], help="of benchmarks/models"
    )
    result.add_argument("--rows", type=int, nargs="+", default=BODY_ROWS)
    result.add_argument("--rounds", type=int, default=15)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result file")
    result.add_argument("--commit", help="where the tree came without its history")
    return result


@torch.inference_mode()
def main() -> None:
    arguments = parser().parse_args()
    metrics: dict[str, Any] = {}
    for model in arguments.model:
        times = metrics[Path(model).name] = measure(model, arguments)
        _print_table(model, times, read_base_model(CONFIGS / model))
    write_result(
        "products",
        benchmark="products",
        device=device_name(arguments.device),
        config={"rounds": arguments.rounds, "dtype": arguments.dtype},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
