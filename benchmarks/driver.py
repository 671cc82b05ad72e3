"""What benchmarks do to an engine in place of the worker's front."""

import time
from collections.abc import Sequence

from benchmarks.random_images import RandomImages
from lorry.worker import messages as m
from lorry.worker.engine import Engine
from lorry.worker.engine_process import LOAD_WAIT_S


def greedy(request: int, version: bytes, token_ids: list[int], max_tokens: int) -> m.Submit:
    """A request that no stop token ends."""
    return m.Submit(
        request=request,
        tenant="default",
        version=version,
        token_ids=token_ids,
        generated_tokens=0,
        max_tokens=max_tokens,
        min_tokens=0,
        stop_token_ids=[],
        temperature=0.0,
        seed=request % 2**32,
        remaining_s=None,
    )


class Driver:
    """Steps an engine and answers its fetches of images at once."""

    def __init__(self, engine: Engine, images: RandomImages, adapters: Sequence[int]) -> None:
        self.engine = engine
        self._images = images
        self._adapters = {images.version(adapter): adapter for adapter in adapters}

    def step(self) -> list[m.Event]:
        """One step, begun when the worker would; what it told, except of fetches."""
        if self.engine.awaits_only_loads:
            time.sleep(LOAD_WAIT_S)
        self.engine.step()
        events = list[m.Event]()
        for event in self.engine.take_events():
            if isinstance(event, m.FetchImage):
                self.engine.handle([self._images.image(self._adapters[event.version])])
            else:
                assert not (isinstance(event, m.Finished) and event.failure), event
                events.append(event)
        return events

    @property
    def replays(self) -> int:
        return self.engine.runner.counts.graph_replays

    @property
    def padded_rows(self) -> int:
        return self.engine.runner.counts.padded_rows

    def evict_all(self) -> None:
        """Forget every adapter, so that they are loaded again."""
        engine = self.engine
        versions = [adapter.version for adapter in engine.scheduler.residency]
        engine.handle([m.EvictAdapter(0, version) for version in versions])
        engine.step()
        engine.take_events()
        engine.scheduler.check_integrity()
