"""Multi-adapter traces in the form of the S-LoRA evaluation (arXiv 2311.03285, section 7).

Adapter i, from 0, is asked for with probability proportional to ``(i + 1) ** -alpha``: alpha 0 is
uniform, alpha 1 is Zipf. Gaps between arrivals are Gamma distributed with mean ``1 / rate`` and
coefficient of variation `cv`; 1 is a Poisson process. Lengths are uniform, both ends included, and
do not depend on the number of adapters. numpy's frozen RandomState streams make a trace the same
under every numpy version.
"""

from dataclasses import dataclass

import numpy as np

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_s: float
    adapter: int  # or NO_ADAPTER
    prompt_tokens: int
    output_tokens: int


def make_trace(
    *,
    requests: int,
    adapters: int,
    alpha: float = 1.0,
    rate: float = 2.0,
    cv: float = 1.0,
    prompt_tokens: tuple[int, int] = (8, 512),
    output_tokens: tuple[int, int] = (8, 512),
    seed: int = 42,
) -> list[TraceRequest]:
    """A trace over `adapters` adapters; with 0, all requests are for the base model."""
    lengths = np.random.RandomState(seed)
    prompts = lengths.randint(prompt_tokens[0], prompt_tokens[1] + 1, requests)
    outputs = lengths.randint(output_tokens[0], output_tokens[1] + 1, requests)
    weights = np.arange(1, max(adapters, 1) + 1, dtype=np.float64) ** -alpha
    probabilities = weights / weights.sum()
    chosen = np.random.RandomState(seed + 1).choice(len(weights), size=requests, p=probabilities)
    shape = 1.0 / cv**2
    gaps = np.random.RandomState(seed + 2).gamma(shape, 1.0 / (rate * shape), size=requests)
    arrivals = np.cumsum(gaps).round(4)
    return [
        TraceRequest(
            float(arrivals[i]),
            int(chosen[i]) if adapters else NO_ADAPTER,
            int(prompts[i]),
            int(outputs[i]),
        )
        for i in range(requests)
    ]
