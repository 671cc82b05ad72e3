"""The settings of S-LoRA's evaluation (arXiv 2311.03285, section 7) on this engine.

    python -m benchmarks.reproduction --settings s1 s2
    python -m benchmarks.reproduction --settings s4

Requests come from S-LoRA's own generator, at their times, as in its figures 5 and 6 and table 3.
Its `alpha` is the exponent of ``floor(adapters * power(alpha))``: 1 is uniform, and 0.1 gives one
of 200 adapters 59 % of the requests. Lengths are uniform from 8 to 511 tokens. Throughput counts
until the last request has ended; attainment is the share whose first token came within 6 s.

The paper's runs take 300 s a cell; a cell here takes `--seconds`, so that the grid of a setting
fits in ten minutes of a GPU. The grid goes along one axis at a time from a cell below saturation,
and its rates pass what a card of 2023 could take: the highest are meant to be too high. The result
file is written again after every cell.
"""

import argparse
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.building import GIB, build, device_name, engine_parser, model_of, pool_gib
from benchmarks.card import Card, find_card
from benchmarks.driver import Driver
from benchmarks.engine import distinct_prompts
from benchmarks.random_images import RandomImages, image_directory
from benchmarks.results_file import RESULTS, write_result
from benchmarks.roofline import ideal_model, ideal_seconds
from benchmarks.simulation.slora_recorded import recorded_trace
from benchmarks.trace_run import TraceRun
from lorry.client.bench.trace import TraceRequest
from lorry.kernels.page_layout import PageLayout
from lorry.worker.engine import Engine

SLO_TTFT_S = 6.0  # S-LoRA's
KEPT = (
    *("seconds", "req_per_s", "out_tok_per_s", "latency_s", "ttft_s", "token_gap_s", "steps"),
    *("adapter_loads", "adapter_evictions", "preemptions"),
)


class Cell(NamedTuple):
    adapters: int
    rate: float  # requests a second
    cv: float = 1.0
    alpha: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperSetting:
    """A model with its adapters' ranks, and the axes that are measured from the cell of `rate`."""

    model: str
    ranks: tuple[int, ...]
    adapters: int  # of the axes other than that of adapters
    rate: float  # of the axes of cv and alpha: below saturation
    saturating: float  # the rate of the axis of adapters
    by_adapters: tuple[int, ...]
    by_rate: tuple[float, ...] = ()
    by_cv: tuple[float, ...] = ()
    by_alpha: tuple[float, ...] = ()

    def cells(self) -> Iterator[Cell]:
        """Every cell once, those of table 3 first."""
        axes = itertools.chain(
            (Cell(adapters, self.saturating) for adapters in self.by_adapters),
            (Cell(self.adapters, rate) for rate in self.by_rate),
            (Cell(self.adapters, self.rate, cv=cv) for cv in self.by_cv),
            (Cell(self.adapters, self.rate, alpha=alpha) for alpha in self.by_alpha),
        )
        yield from dict.fromkeys(axes)


SETTINGS = {
    "s1": PaperSetting(
        model="llama-2-7b",
        ranks=(8,),
        adapters=200,
        rate=24,
        saturating=32,
        by_adapters=(5, 1000, 2000),
    ),
    "s2": PaperSetting(
        model="llama-2-7b",
        ranks=(64, 32, 16, 8),
        adapters=200,
        rate=24,
        saturating=32,
        by_adapters=(5, 100, 1000, 2000),
        by_rate=(8, 16, 24, 32, 40),
        by_cv=(4, 8),
        by_alpha=(0.1, 0.3),
    ),
    "s4": PaperSetting(
        model="llama-2-13b",
        ranks=(64, 32, 16),
        adapters=400,
        rate=12,
        saturating=16,
        by_adapters=(2, 100, 1000),
        by_rate=(4, 8, 12, 16, 20),
        by_cv=(4, 8),
        by_alpha=(0.1, 0.3),
    ),
}


def measure(engine: Engine, layout: PageLayout, run: "PaperRun", cell: Cell) -> dict[str, Any]:
    """Serve the generator's requests of one cell."""
    trace = recorded_trace(
        cell.adapters, cell.rate, alpha=cell.alpha, cv=cell.cv, seconds=run.seconds
    )
    prompts = distinct_prompts(trace, run.vocabulary, 0)
    with image_directory() as directory:
        images = RandomImages(directory, layout, run.ranks, cell.adapters)
        served = TraceRun(engine, images, trace, first=time.time_ns(), at_arrivals=True)
        metrics = served.run(prompts, engine.scheduler.limits.max_context_tokens)
        Driver(engine, images, []).evict_all()
    ideal = _ideal(run, trace, pool_gib(engine, layout))
    delays = served.first_token_delays_s / SLO_TTFT_S
    return (
        cell._asdict()
        | {name: metrics[name] for name in KEPT}
        | ideal
        | {
            "attainment": float((delays < 1).mean()),
            "satisfaction": float(np.clip(1 - delays**2, 0, None).mean()),
        }
    )


def _ideal(run: "PaperRun", trace: Sequence[TraceRequest], size_gib: float) -> dict[str, float]:
    """Throughput of the ideal engine at the same arrivals, where the card's rates are known."""
    model = ideal_model(run.card, run.model)
    if run.card is None or model is None:
        return {}
    pool_bytes = size_gib * GIB
    seconds = ideal_seconds(
        run.card, model, trace, run.ranks, pool_bytes=pool_bytes, at_arrivals=True
    )
    return {"ideal_req_per_s": len(trace) / seconds}


class PaperRun(NamedTuple):
    """What the cells of a setting share."""

    model: str
    card: Card | None
    ranks: tuple[int, ...]
    seconds: float
    vocabulary: int


def measure_setting(engine: Engine, name: str, arguments: argparse.Namespace) -> None:
    """Measure a setting's cells; what was measured is written after each."""
    base_model, layout = model_of(arguments)
    setting, cells = SETTINGS[name], list[dict[str, Any]]()
    card = find_card(device_name(arguments.device), (RESULTS, arguments.directory))
    run = PaperRun(arguments.model, card, setting.ranks, arguments.seconds, base_model.vocab_size)
    for cell in itertools.islice(setting.cells(), arguments.cells):
        found = measure(engine, layout, run, cell)
        cells.append(found)
        print(f"{name}, {cell}: {found['req_per_s']:.2f} req/s", flush=True)
        write_result(
            f"reproduction-{name}",
            benchmark="reproduction",
            device=device_name(arguments.device),
            config={
                "setting": name,
                "model": arguments.model,
                "ranks": setting.ranks,
                "cell_seconds": arguments.seconds,
                "slo_ttft_s": SLO_TTFT_S,
                "pool_gib": round(pool_gib(engine, layout), 2),
                "dtype": arguments.dtype,
            },
            metrics={"cells": cells},
            directory=arguments.directory,
            commit=arguments.commit,
        )


def parser() -> argparse.ArgumentParser:
    result = engine_parser(__doc__)
    result.set_defaults(model=None, ranks=[64])
    result.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=["s1", "s2"], help="of one model"
    )
    result.add_argument("--seconds", type=float, default=20.0, help="of requests in each cell")
    result.add_argument("--cells", type=int, help="measure only the first of each setting")
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    options = parser()
    arguments = options.parse_args()
    models = {SETTINGS[name].model for name in arguments.settings}
    if len(models) > 1:
        options.error(f"--settings must be of one model, got those of {sorted(models)}")
    arguments.model = arguments.model or models.pop()
    base_model, layout = model_of(arguments)
    engine, _ = build(arguments, base_model, layout)
    for name in arguments.settings:
        measure_setting(engine, name, arguments)


if __name__ == "__main__":
    main()
