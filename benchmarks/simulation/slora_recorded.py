"""What S-LoRA's repository and paper record (arXiv 2311.03285), and the requests they were of.

Runs of 300 s over uniformly popular adapters; the generator is theirs, so the traces are the same.
"""

from dataclasses import dataclass

import numpy as np

from lorry.client.bench.trace import NO_ADAPTER, TraceRequest

SECONDS = 300
SEED = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    name: str
    pool_tokens: int
    ranks: tuple[int, ...]  # of the setting
    adapters: int  # in the study of early abort
    rate: float  # there


A10G_S2 = Hardware(name="a10g-s2", pool_tokens=14_500, ranks=(64, 32, 16, 8), adapters=200, rate=2)
A100_S4 = Hardware(name="a100-s4", pool_tokens=65_000, ranks=(64, 32, 16), adapters=400, rate=6)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One run by first come, first served; None where it was not recorded."""

    adapters: int
    rate: float
    req_per_s: float
    ttft_s: float | None = None
    latency_s: float | None = None
    attainment: float | None = None


# Runs without adapters are left out: they skip S-LoRA's kernels altogether. So is the one of one
# adapter on the A100, whose throughput (4.43) is nearly that of 200 adapters (4.17), while on the
# A10G it is far above: costs that grow with the adapters' ranks cannot have both.
FCFS_RUNS = {
    A10G_S2: (
        Recorded(1, 2, 1.744, latency_s=24.2),
        Recorded(20, 2, 1.680, latency_s=28.6),
        Recorded(200, 1, 0.961, ttft_s=0.32, attainment=1.0),
        Recorded(200, 1.5, 1.364, ttft_s=1.17, attainment=0.978),
        Recorded(200, 2, 1.575, ttft_s=23.6, attainment=0.272),
        Recorded(200, 2.5, 1.536, ttft_s=87, attainment=0.055),
    ),
    A100_S4: (
        Recorded(200, 6, 4.172, latency_s=77.6),
        Recorded(400, 1, 0.942, ttft_s=0.36),
        Recorded(400, 2, 1.838, ttft_s=0.50),
        Recorded(400, 4, 3.539, ttft_s=0.74),
        Recorded(400, 6, 4.056, ttft_s=60, latency_s=84.1, attainment=0.101),
        Recorded(400, 8, 4.017, ttft_s=137),
    ),
}
CVS = (1, 2, 4, 6, 8)
# Figure 10: attainment and satisfaction by cv. None: not recorded.
POLICIES: dict[Hardware, dict[str, dict[str, tuple[float, ...]]]] = {
    A10G_S2: {
        "fcfs": {
            "attainment": (0.270, 0.263, 0.433, 0.408, 0.315),
            "satisfaction": (0.197, 0.227, 0.371, 0.369, 0.263),
        },
        "lcfs": {
            "attainment": (0.790, 0.697, 0.640, 0.600, 0.500),
            "satisfaction": (0.729, 0.641, 0.572, 0.529, 0.413),
        },
        "abort": {
            "attainment": (0.858, 0.817, 0.743, 0.690, 0.637),
            "satisfaction": (0.755, 0.713, 0.666, 0.631, 0.547),
        },
    },
    A100_S4: {
        "fcfs": {"attainment": (0.101, 0.101, 0.099, 0.279, 0.136)},
        "lcfs": {
            "attainment": (0.699, 0.701, 0.593, 0.575, 0.447),
            "satisfaction": (0.655, 0.645, 0.524, 0.449, 0.322),
        },
        "abort": {
            "attainment": (0.719, 0.719, 0.685, 0.660, 0.562),
            "satisfaction": (0.646, 0.633, 0.587, 0.538, 0.394),
        },
    },
}


def recorded_trace(
    adapters: int,
    rate: float,
    *,
    alpha: float = 1.0,
    cv: float = 1.0,
    seed: int = SEED,
    seconds: float = SECONDS,
) -> list[TraceRequest]:
    """The requests of a recorded run, drawn in the order in which S-LoRA's generator draws.

    Its `alpha` is the exponent of a power distribution: 1 is uniform, less is more skewed.
    """
    random, count = np.random.RandomState(seed), int(rate * seconds)
    chosen = (random.power(alpha, count) * adapters).astype(int)
    prompts, outputs = (random.randint(8, 512, count) for _ in range(2))
    arrivals = np.cumsum(random.gamma(1 / cv**2, cv**2 / rate, count))
    return [
        TraceRequest(
            float(arrivals[i]),
            int(chosen[i]) if adapters else NO_ADAPTER,
            int(prompts[i]),
            int(outputs[i]),
        )
        for i in range(count)
    ]
