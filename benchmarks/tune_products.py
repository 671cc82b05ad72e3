"""Which of cuBLAS's algorithms is the fastest for each product of a model, by a step's rows.

    python -m benchmarks.tune_products --model llama-3-8b llama-2-7b

An algorithm is measured where it will run: in a CUDA graph of all products of some layers, of which
one is by that algorithm and the others are torch's. Alone, on a cooler GPU, others win. All
graphs take turns, in random order. What is faster goes into the table that the worker reads.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.building import CONFIGS, device_name
from benchmarks.products import MOST_SAMPLES, PRODUCTS, Body
from benchmarks.timing import replayable
from lorry.kernels.cublas_lt import CublasLt, Shape
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.kernels.partition import Partition
from lorry.rpc.base_model import read_base_model
from lorry.worker.buckets import bucket_sizes
from lorry.worker.operations import Product
from lorry.worker.products import ALGORITHMS, FastestLinear
from lorry.worker.weights import RandomWeights, load_weights

LEAST_GAIN = 0.005  # of the time of all products: less is noise


class Tuning:
    """The search for one model."""

    def __init__(self, name: str, layers: int, rounds: int) -> None:
        base_model, device = read_base_model(CONFIGS / name), torch.device("cuda")
        layout = PageLayout(geometry=base_model.geometry, dtype=Dtype.BF16)
        weights = load_weights(base_model, RandomWeights(torch.bfloat16, device), Partition(layout))
        self.library = CublasLt(device)
        self._head = weights.head
        first = weights.layers[0]
        self._weights: set[tuple[int, int]] = {
            getattr(first, product).weight_OI.shape for product in PRODUCTS
        }
        self._body = Body(weights, base_model.geometry, max(bucket_sizes(1024)))
        self._layers, self._rounds, self._device = layers, rounds, device

    def fastest(self, rows: int) -> dict[Shape, int]:
        """The algorithms to take at `rows` rows, where torch's are slower."""
        found = self._of_body(rows)
        if rows <= MOST_SAMPLES:
            found |= self._of_head(rows)
        return found

    def _of_body(self, rows: int) -> dict[Shape, int]:
        shapes = {(rows, outputs, inputs) for outputs, inputs in self._weights}
        single = [{shape: number} for shape in shapes for number in self._others(shape)]
        times = self._times([{}, *single], partial(self._run_body, rows))
        chosen = dict[Shape, int]()
        for shape in shapes:
            mine = [(times[place], one) for place, one in enumerate(single, 1) if shape in one]
            best_ms, best = min(mine, key=lambda pair: pair[0], default=(times[0], {}))
            if best_ms < (1 - LEAST_GAIN) * times[0]:
                chosen |= best
        if not chosen:
            return {}
        default_ms, chosen_ms = self._times([{}, chosen], partial(self._run_body, rows))
        print(f"{rows:5} rows: {default_ms:.3f} to {chosen_ms:.3f} ms by {chosen}", flush=True)
        return chosen if chosen_ms < (1 - LEAST_GAIN) * default_ms else {}

    def _of_head(self, rows: int) -> dict[Shape, int]:
        outputs, inputs = self._head.shape
        shape = (rows, outputs, inputs)
        choices = [{}, *({shape: number} for number in self._others(shape))]
        times = self._times(choices, lambda product: product(self._body.x_TH[:rows], self._head))
        best = min(range(len(times)), key=times.__getitem__)
        return choices[best] if times[best] < (1 - LEAST_GAIN) * times[0] else {}

    def _others(self, shape: Shape) -> range:
        """torch's is the first."""
        return range(1, self.library.count(shape))

    def _run_body(self, rows: int, product: Product) -> None:
        self._body.run(rows, PRODUCTS, product, layers=self._layers)

    def _times(
        self, choices: list[dict[Shape, int]], run: Callable[[Product], object]
    ) -> list[float]:
        """Median milliseconds of a run with each choice of algorithms."""
        products = [FastestLinear(self.library, choice) for choice in choices]
        launches = {place: partial(run, product) for place, product in enumerate(products)}
        replays = replayable(launches, self._device)
        times: list[list[float]] = [[] for _ in choices]
        for number in range(self._rounds + 1):
            for place in random.sample(range(len(choices)), len(choices)):
                elapsed_ms = _elapsed_ms(replays[place])
                if number:
                    times[place].append(elapsed_ms)
        return [median(values) for values in times]


def _elapsed_ms(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def write_table(path: Path, gpu: str, version: int, found: Mapping[Shape, int]) -> None:
    """Put what was found for a GPU in the place of what the table has for it."""
    table = json.loads(path.read_text()) if path.exists() else {}
    of_gpu: dict[str, dict[str, int]] = {}
    for (rows, outputs, inputs), algorithm in sorted(found.items()):
        of_gpu.setdefault(f"{outputs}x{inputs}", {})[str(rows)] = algorithm
    table[f"{gpu}, cublasLt {version}"] = of_gpu
    path.write_text(json.dumps(table, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--model", nargs="+", default=["llama-3-8b", "llama-2-7b"])
    result.add_argument("--rows", type=int, nargs="+", default=bucket_sizes(1024))
    result.add_argument("--layers", type=int, default=8)
    result.add_argument("--rounds", type=int, default=9)
    result.add_argument(
        "--table", type=Path, default=ALGORITHMS, help="whose entries for this GPU are replaced"
    )
    return result


@torch.inference_mode()
def main() -> None:
    arguments = parser().parse_args()
    found = dict[Shape, int]()
    for model in arguments.model:
        print(model, flush=True)
        tuning = Tuning(model, arguments.layers, arguments.rounds)
        for rows in arguments.rows:
            found = tuning.fastest(rows) | found  # of a shape of two models, the first's
        write_table(arguments.table, device_name("cuda"), tuning.library.version, found)
        del tuning


if __name__ == "__main__":
    main()
