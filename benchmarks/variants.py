"""An engine without one part of its design, for as long as a block runs."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from unittest.mock import patch

from benchmarks.padded_products import padded_products
from lorry.worker import scheduler as scheduler_module
from lorry.worker.adapter_loader import AdapterLoader
from lorry.worker.cuda_runner import CudaRunner
from lorry.worker.engine import Engine
from lorry.worker.plan import Plan
from lorry.worker.pool import PagePool
from lorry.worker.prefix_cache import PrefixCache
from lorry.worker.residency import Adapter, AdapterState, Residency
from lorry.worker.room import Room
from lorry.worker.step_graphs import StepGraphs

Variant = Callable[[Engine], AbstractContextManager[None]]

WHOLE = "whole engine"
SPLIT_POOL = "split pool"
PADDED_RANKS = "padded ranks"
NO_GRAPHS = "no graphs"
PADDED_PRODUCTS = "padded products"
BATCH_INVARIANT = "batch-invariant"
UNFUSED = "unfused"


def variants_on(device: str, adapter_share: float) -> dict[str, Variant]:
    """Those that a device has; `adapter_share` of the pool is for adapters where it is split.

    Padded products cannot be captured: on a GPU they are to be compared with "no graphs".
    """
    variants: dict[str, Variant] = {
        WHOLE: _unchanged,
        SPLIT_POOL: partial(split_pool, adapter_share=adapter_share),
        PADDED_RANKS: _unchanged,  # by its images: all adapters have the largest rank
        "no prefetch": without_prefetch,
        PADDED_PRODUCTS: with_padded_products,
    }
    if device == "cuda":
        variants |= {
            "no overlap": without_overlap,
            NO_GRAPHS: without_graphs,
            BATCH_INVARIANT: OtherSteps(lambda runner: runner.captured(batch_invariant=True)),
            UNFUSED: OtherSteps(lambda runner: runner.captured(fused=False)),
        }
    return variants


@contextlib.contextmanager
def _unchanged(_: Engine) -> Iterator[None]:
    yield


@contextlib.contextmanager
def without_overlap(engine: Engine) -> Iterator[None]:
    """A step is launched only once the one before it was read."""
    with patch.object(engine.runner, "max_in_flight", 1):
        yield


@contextlib.contextmanager
def without_graphs(engine: Engine) -> Iterator[None]:
    """Every kernel of a step is launched by the host."""
    assert isinstance(engine.runner, CudaRunner)
    graphs = engine.runner.graphs
    with patch.object(graphs, "replay", graphs.launch):
        yield


class OtherSteps:
    """Steps that are computed otherwise, over the engine's memory; captured at the first use."""

    def __init__(self, capture: Callable[[CudaRunner], StepGraphs]) -> None:
        self._capture = capture
        self._graphs: StepGraphs | None = None

    @contextlib.contextmanager
    def __call__(self, engine: Engine) -> Iterator[None]:
        runner = engine.runner
        assert isinstance(runner, CudaRunner)
        self._graphs = self._graphs or self._capture(runner)
        with patch.object(runner, "graphs", self._graphs):
            yield


@contextlib.contextmanager
def with_padded_products(engine: Engine) -> Iterator[None]:
    """LoRA as S-LoRA-bmm computes it, launched kernel by kernel."""
    with ExitStack() as stack:
        if isinstance(engine.runner, CudaRunner):
            stack.enter_context(without_graphs(engine))
        stack.enter_context(padded_products())
        yield


@contextlib.contextmanager
def without_prefetch(engine: Engine) -> Iterator[None]:
    """An adapter is loaded only once a request that needs it could start."""
    limits = dataclasses.replace(engine.scheduler.limits, max_ahead=0)
    with patch.object(engine.scheduler, "limits", limits):
        yield


@contextlib.contextmanager
def split_pool(engine: Engine, *, adapter_share: float) -> Iterator[None]:
    """Some of the pool is for adapters, the rest for KV, whatever the load needs.

    The prefix cache, which would take from the KV's part, is to be off.
    """
    assert not engine.scheduler.limits.prefix_cache
    pages = adapter_pages(engine, adapter_share)
    with (
        patch.object(scheduler_module, "Room", partial(_KvRoom, pages)),
        patch.object(scheduler_module, "AdapterLoader", partial(_SplitLoader, pages)),
    ):
        yield


def adapter_pages(engine: Engine, adapter_share: float) -> int:
    """Pages of the adapters' part of a split pool."""
    return int(adapter_share * engine.scheduler.pool.total)


class _KvRoom(Room):
    """Makes room for KV only, in its part of the pool, where nothing is to be evicted."""

    def __init__(
        self,
        adapter_pages: int,
        pool: PagePool,
        residency: Residency,
        prefixes: PrefixCache,
        plan: Plan,
        step: int,
    ) -> None:
        super().__init__(pool, residency, prefixes, plan, step)
        self._kv_pages = pool.total - adapter_pages

    def can_make(self, pages: int, keep: Collection[int] = ()) -> bool:
        return self._pool.kv + pages <= self._kv_pages

    def make(self, pages: int, keep: Collection[int] = ()) -> bool:
        return self.can_make(pages)


class _SplitLoader(AdapterLoader):
    """Loads into the adapters' part, and evicts adapters alone for it, longest idle first."""

    def __init__(
        self, adapter_pages: int, residency: Residency, room: Room, plan: Plan, *, max_fetches: int
    ) -> None:
        super().__init__(residency, room, plan, max_fetches=max_fetches)
        self._adapter_pages = adapter_pages

    def _load(self, adapter: Adapter, watermark: int) -> None:
        loaded = (AdapterState.LOADING, AdapterState.RESIDENT)
        used = sum(a.num_pages for a in self._residency if a.state in loaded)
        if used - self._residency.spare_pages + adapter.num_pages > self._adapter_pages:
            return
        for victim in list(self._residency.spare()):
            if used + adapter.num_pages <= self._adapter_pages:
                break
            self._residency.evict(victim)
            self._plan.evicted.append(victim.version)
            used -= victim.num_pages
        self._residency.begin_load(adapter)
        self._plan.loads.append(adapter)
