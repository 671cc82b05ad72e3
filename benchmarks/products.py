"""The time of a step's base products by its rows: what `benchmarks/card.py` knows a card by.

    python -m benchmarks.products
    python -m benchmarks.products --split --model llama-3-8b

The body is the products of all layers on every row of a step, the head the product with the
vocabulary on the rows that sample. Each is one CUDA graph over the very weights that the engine
loads, so that no layer finds another's in a cache; the graphs of all sizes take turns. With
`--split` the body's four products are also measured apart, at all the engine's buckets.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.building import CONFIGS, device_name
from benchmarks.results_file import RESULTS, write_result
from benchmarks.timing import interleaved_ms, replayable
from lorry.kernels.page_layout import ModelGeometry, PageLayout
from lorry.kernels.partition import Partition
from lorry.kernels.pool_view import TORCH_DTYPES
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.service_config import DTYPES
from lorry.worker.buckets import bucket_sizes
from lorry.worker.operations import Product, Projection
from lorry.worker.products import torch_linear
from lorry.worker.weights import ModelWeights, RandomWeights, load_weights

BODY_ROWS = [
    *(1, 2, 4, 8, 16, 32, 48),
    *range(64, 257, 32),
    *range(320, 1025, 64),
    *(1280, 1536, 2048),
]
MOST_SAMPLES = 512
PRODUCTS = ("qkv", "o", "gate_up", "down")  # of a layer, by their names in `LayerWeights`
ADDED = ("o", "down")


def measure(model: str, arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Median milliseconds of body, head and with `--split` each product, by their rows."""
    base_model, device = read_base_model(CONFIGS / model), torch.device(arguments.device)
    dtype = TORCH_DTYPES[DTYPES[arguments.dtype]]
    layout = PageLayout(geometry=base_model.geometry, dtype=DTYPES[arguments.dtype])
    weights = load_weights(base_model, RandomWeights(dtype, device), Partition(layout))
    body = Body(weights, base_model.geometry, max(arguments.rows))
    launches: dict[tuple[str, int], Callable[[], object]] = {}
    for rows in arguments.rows:
        launches["body_ms", rows] = partial(body.run, rows, PRODUCTS)
        if rows <= MOST_SAMPLES:
            launches["head_ms", rows] = partial(linear, body.x_TH[:rows], weights.head)
        for product in PRODUCTS if arguments.split else ():
            launches[f"{product}_ms", rows] = partial(body.run, rows, [product])
    times = interleaved_ms(replayable(launches, device), device, arguments.rounds)
    found: dict[str, dict[int, float]] = {part: {} for part, _ in launches}
    for (part, rows), values in times.items():
        found[part][rows] = round(median(values), 4)
    return found


class Body:
    """The products of all layers, on inputs of up to `most` rows that are random numbers.

    With `adds`, as a GPU without others computes: those of ADDED are added to a residual.
    """

    def __init__(
        self, weights: ModelWeights, geometry: ModelGeometry, most: int, *, adds: bool = False
    ) -> None:
        self._layers = weights.layers
        like = weights.head
        self.x_TH = _random(most, geometry.hidden, like)
        mixed_TQ = _random(most, geometry.heads * geometry.head_dim, like)
        product_TI = _random(most, geometry.intermediate, like)
        self._residual_TH = torch.zeros_like(self.x_TH) if adds else None
        self._inputs = {"qkv": self.x_TH, "o": mixed_TQ, "gate_up": self.x_TH, "down": product_TI}

    def run(self, rows: int, products: Sequence[str], multiply: Product = torch_linear) -> None:
        inputs = {product: self._inputs[product][:rows] for product in products}
        residual_TH = None if self._residual_TH is None else self._residual_TH[:rows]
        for layer in self._layers:
            for product, input_TI in inputs.items():
                base: Projection = getattr(layer, product)
                onto_TO = residual_TH if product in ADDED else None
                multiply(input_TI, base.weight_OI, base.bias_O, onto_TO=onto_TO)


def _random(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows, width, dtype=like.dtype, device=like.device).normal_()


def _print_table(model: str, times: dict[str, dict[int, float]], base_model: BaseModel) -> None:
    columns = "".join(f"{part.removesuffix('_ms'):>9}" for part in times)
    print(f"{model}, milliseconds\n{'rows':>6}{columns}  TFLOP/s of the body")
    body_ms = times["body_ms"]
    for rows, rows_ms in body_ms.items():
        cells = "".join(f"{part.get(rows, float('nan')):9.3f}" for part in times.values())
        faster = [more for more in body_ms if more > rows and body_ms[more] < 0.98 * rows_ms]
        note = f"  slower than {min(faster, key=body_ms.__getitem__)} rows" if faster else ""
        tera_flops = 2 * _body_weights(base_model) * rows / rows_ms / 1e9
        print(f"{rows:6}{cells}{tera_flops:9.1f}{note}", flush=True)


def _body_weights(base_model: BaseModel) -> int:
    geometry = base_model.geometry
    hidden, heads = geometry.hidden, geometry.heads * geometry.head_dim
    attention = hidden * (2 * heads + 2 * geometry.kv_heads * geometry.head_dim)
    return geometry.layers * (attention + 3 * hidden * geometry.intermediate)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument(
        "--model",
        nargs="+",
        default=["llama-2-7b", "llama-3-8b", "llama-2-13b"],
        help="of benchmarks/models",
    )
    result.add_argument("--rows", type=int, nargs="+", help="of the body")
    result.add_argument("--split", action="store_true", help="measure each product apart too")
    result.add_argument("--rounds", type=int, default=15)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result file")
    result.add_argument("--commit", help="where the tree came without its history")
    return result


@torch.inference_mode()
def main() -> None:
    arguments = parser().parse_args()
    arguments.rows = arguments.rows or (bucket_sizes(1024) if arguments.split else BODY_ROWS)
    metrics: dict[str, Any] = {}
    for model in arguments.model:
        times = metrics[Path(model).name] = measure(model, arguments)
        _print_table(model, times, read_base_model(CONFIGS / model))
    write_result(
        "products-split" if arguments.split else "products",
        benchmark="products",
        device=device_name(arguments.device),
        config={"rounds": arguments.rounds, "dtype": arguments.dtype},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
