"""How a pool's pages are split between KV and adapters while a trace is served."""

from typing import NamedTuple

from lorry.worker.pool import PagePool

MOST_SAMPLES = 240


class _Sample(NamedTuple):
    time_s: float
    kv: int
    prefix: int
    adapter: int
    free: int


class PoolSplit:
    """Notes the split after every step, and keeps what a plot shows."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._samples: list[_Sample] = []

    def note(self, now_s: float) -> None:
        pool = self._pool
        self._samples.append(_Sample(now_s, pool.kv, pool.prefix, pool.adapter, pool.free))

    def samples(self) -> dict[str, list[float]]:
        """By name: its values over time, of evenly spaced steps and the last one."""
        stride = -(-len(self._samples) // MOST_SAMPLES)
        kept = self._samples[-1::-stride][::-1]
        columns = zip(*kept, strict=True)
        return {
            name: [round(value, 3) for value in values]
            for name, values in zip(_Sample._fields, columns, strict=True)
        }
