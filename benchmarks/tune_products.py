"""Which of cuBLAS's algorithms is the fastest for each product of a model, by a step's rows.

    python -m benchmarks.tune_products
    python -m benchmarks.tune_products --model llama-2-13b --tensor-parallel 2

An algorithm is measured where it will run: in a CUDA graph of all products of some layers, of which
one is by that algorithm and the others are torch's. Alone, on a cooler GPU, others win. All
graphs take turns, in random order. What is faster goes into the table that the worker reads, and
what it saves into a result file.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.building import CONFIGS, device_name
from benchmarks.products import MOST_SAMPLES, PRODUCTS, Body
from benchmarks.results_file import RESULTS, write_result
from benchmarks.timing import replayable
from lorry.kernels.cublas_lt import CublasLt, Shape
from lorry.kernels.page_layout import Dtype, PageLayout, TpStrategy
from lorry.kernels.partition import Partition
from lorry.rpc.base_model import read_base_model
from lorry.worker.buckets import bucket_sizes
from lorry.worker.operations import Product
from lorry.worker.products import ALGORITHMS, FastestLinear
from lorry.worker.weights import RandomWeights, load_weights

LAYERS = 8  # whose weights no cache holds
LEAST_GAIN = 0.005  # of the time of all products: less is noise
FIRST = 0  # the algorithm that torch takes

Choice = dict[Shape, int]


class Tuning:
    """The search for one model, or one rank's part of it."""

    def __init__(self, model: str, tensor_parallel: int, rounds: int, most_rows: int) -> None:
        base_model, self._device = read_base_model(CONFIGS / model), torch.device("cuda")
        geometry = dataclasses.replace(base_model.geometry, layers=LAYERS)
        layout = PageLayout(
            geometry=geometry,
            dtype=Dtype.BF16,
            tp_size=tensor_parallel,
            tp_strategy=TpStrategy.REPLICATED if tensor_parallel > 1 else None,
        )
        weights = load_weights(
            dataclasses.replace(base_model, geometry=geometry),
            RandomWeights(torch.bfloat16, self._device),
            Partition(layout),
        )
        self.library, self._head, self._rounds = CublasLt(self._device), weights.head, rounds
        layer = [getattr(weights.layers[0], product) for product in PRODUCTS]
        self._layer = [base.weight_OI for base in layer if base.bias_O is None]
        adds = tensor_parallel == 1
        self._body = Body(weights, layout.local_geometry, most_rows, adds=adds)

    def of_layers(self, rows: int) -> tuple[Choice, dict[str, float]]:
        """The fastest algorithms, and the milliseconds with and without them."""
        run = partial(self._body.run, rows, PRODUCTS)
        shapes = [_shape(rows, weight_OI) for weight_OI in self._layer]
        single = [{shape: number} for shape in shapes for number in self._others(shape)]
        first_ms, *single_ms = self._times_ms(run, [{}, *single])
        gains = sorted(zip(single_ms, single, strict=True), key=lambda pair: -pair[0])
        faster = [one for one_ms, one in gains if one_ms < (1 - LEAST_GAIN) * first_ms]
        together: Choice = {}
        for one in faster:  # of a shape, the fastest comes last
            together |= one
        finalists = [{}, together, *faster[-1:]]
        times_ms = self._times_ms(run, finalists)
        best = _fastest(times_ms)
        found = dict.fromkeys(shapes, FIRST) | finalists[best]
        return found, {"first_ms": round(times_ms[0], 4), "chosen_ms": round(times_ms[best], 4)}

    def of_head(self, rows: int) -> Choice:
        """The fastest algorithm of the product with the vocabulary."""
        shape = _shape(rows, self._head)
        choices: list[Choice] = [{}, *({shape: number} for number in self._others(shape))]
        return {shape: FIRST} | choices[_fastest(self._times_ms(self._run_head(rows), choices))]

    def _run_head(self, rows: int) -> Callable[[Product], object]:
        return lambda multiply: multiply(self._body.x_TH[:rows], self._head)

    def _others(self, shape: Shape) -> range:
        return range(FIRST + 1, self.library.count(shape))

    def _times_ms(self, run: Callable[[Product], object], choices: Sequence[Choice]) -> list[float]:
        """Median of a run with each choice of algorithms, torch's where nothing is chosen."""
        products = [FastestLinear(self.library, choice) for choice in choices]
        launches = {place: partial(run, product) for place, product in enumerate(products)}
        replays = replayable(launches, self._device)
        times_ms: list[list[float]] = [[] for _ in choices]
        for number in range(self._rounds + 1):
            for place in random.sample(range(len(choices)), len(choices)):
                elapsed_ms = _elapsed_ms(replays[place])
                if number:
                    times_ms[place].append(elapsed_ms)
        return [median(values) for values in times_ms]


def _fastest(times_ms: Sequence[float]) -> int:
    """The place of the least time; the first unless another gains enough."""
    best = min(range(len(times_ms)), key=times_ms.__getitem__)
    return best if times_ms[best] < (1 - LEAST_GAIN) * times_ms[0] else 0


def _shape(rows: int, weight_OI: torch.Tensor) -> Shape:
    outputs, inputs = weight_OI.shape
    return rows, outputs, inputs


def _elapsed_ms(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def update_table(path: Path, gpu: str, version: int, found: Choice) -> None:
    """Replace what the table has of these shapes; it names no first algorithms."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    if path.exists():
        table = json.loads(path.read_text())
    of_gpu = table.setdefault(f"{gpu}, cublasLt {version}", {})
    for (rows, outputs, inputs), algorithm in found.items():
        by_rows = of_gpu.setdefault(f"{outputs}x{inputs}", {})
        by_rows.pop(str(rows), None)
        if algorithm != FIRST:
            by_rows[str(rows)] = algorithm
    table[f"{gpu}, cublasLt {version}"] = {
        weight: dict(sorted(by_rows.items(), key=lambda item: int(item[0])))
        for weight, by_rows in sorted(of_gpu.items())
        if by_rows
    }
    path.write_text(json.dumps(table, indent=1) + "\n")


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Update the table; milliseconds of the layers' products by model and rows."""
    found, saved = Choice(), dict[str, Any]()
    for model in arguments.model:
        size, most_rows = arguments.tensor_parallel, max(arguments.rows)
        tuning, by_rows = Tuning(model, size, arguments.rounds, most_rows), {}
        for rows in arguments.rows:
            of_layers, by_rows[str(rows)] = tuning.of_layers(rows)
            of_head = tuning.of_head(rows) if rows <= MOST_SAMPLES else {}
            found = of_layers | of_head | found  # of a shape of two models, the first's
            print(f"{model}, {rows} rows: {by_rows[str(rows)]}", flush=True)
        saved[model] = by_rows
        update_table(arguments.table, device_name("cuda"), tuning.library.version, found)
        del tuning
    return saved


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--model", nargs="+", default=["llama-3-8b", "llama-2-7b"])
    result.add_argument("--tensor-parallel", type=int, default=1, help="of one rank of so many")
    result.add_argument("--rows", type=int, nargs="+", default=bucket_sizes(1024))
    result.add_argument("--rounds", type=int, default=9)
    result.add_argument("--table", type=Path, default=ALGORITHMS, help="to be updated")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result file")
    result.add_argument("--commit", help="where the tree came without its history")
    return result


@torch.inference_mode()
def main() -> None:
    arguments = parser().parse_args()
    ranks = f"-{arguments.tensor_parallel}" if arguments.tensor_parallel > 1 else ""
    write_result(
        f"product-algorithms-{'-'.join(arguments.model)}{ranks}",
        benchmark="tune_products",
        device=device_name("cuda"),
        config={
            "layers": LAYERS,
            "rounds": arguments.rounds,
            "tensor_parallel": arguments.tensor_parallel,
            "dtype": "bf16",
        },
        metrics=tune(arguments),
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
