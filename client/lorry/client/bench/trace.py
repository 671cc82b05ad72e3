"""Multi-adapter traces, in the form of the S-LoRA evaluation (arXiv 2311.03285, section 7).

Adapter i, from 0, is asked for with probability proportional to ``(i + 1) ** -alpha``: alpha 0 is
uniform, alpha 1 is Zipf. Gaps between arrivals are Gamma distributed with mean ``1 / rate`` and
coefficient of variation `cv`; 1 is a Poisson process. A burst makes time run faster for a while.
Lengths do not depend on the number of adapters. numpy's frozen RandomState streams make a trace the
same under every numpy version.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorry.client.bench.lengths import Lengths, Uniform

NO_ADAPTER = -1
DEFAULT_TENANT = "default"
S_LORA_LENGTHS = Uniform(8, 512)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_s: float
    adapter: int  # of the tenant's, or NO_ADAPTER
    prompt_tokens: int
    output_tokens: int
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Burst:
    """While it lasts there are `factor` times as many arrivals."""

    start_s: float
    duration_s: float
    factor: float

    def __post_init__(self) -> None:
        if not (self.start_s >= 0 and self.duration_s > 0 and self.factor > 0):
            raise ValueError(
                f"a burst must have START >= 0, DURATION > 0 and FACTOR > 0, got {self}"
            )

    @classmethod
    def parse(cls, text: str) -> "Burst":
        """``START:DURATION:FACTOR``; raises ValueError naming the text."""
        try:
            start_s, duration_s, factor = map(float, text.split(":"))
        except ValueError as error:
            raise ValueError(f"a burst must be START:DURATION:FACTOR, got {text!r}") from error
        return cls(start_s, duration_s, factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSpec:
    """What `make_trace` draws."""

    requests: int = 1000
    adapters: int = 200  # of each tenant; 0: all requests are for the base model
    alpha: float = 1.0
    rate: float = 2.0  # requests a second, on average and without bursts
    cv: float = 1.0
    prompt_tokens: Lengths = S_LORA_LENGTHS
    output_tokens: Lengths = S_LORA_LENGTHS
    bursts: Sequence[Burst] = ()
    tenants: Mapping[str, float] = field(default_factory=lambda: {DEFAULT_TENANT: 1.0})  # shares
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("requests", "rate", "cv"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("adapters", "alpha", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.tenants or not all(share > 0 for share in self.tenants.values()):
            raise ValueError(f"the tenants' shares must be positive, got {dict(self.tenants)}")


def make_trace(spec: TraceSpec) -> list[TraceRequest]:
    """Requests by arrival."""
    lengths = np.random.RandomState(spec.seed)
    prompts = spec.prompt_tokens.draw(lengths, spec.requests)
    outputs = spec.output_tokens.draw(lengths, spec.requests)
    arrivals = _arrivals(spec)
    adapters, tenants = _adapters(spec), _tenants(spec)
    return [
        TraceRequest(
            float(arrivals[i]), int(adapters[i]), int(prompts[i]), int(outputs[i]), tenants[i]
        )
        for i in range(spec.requests)
    ]


def merged(*traces: Iterable[TraceRequest]) -> list[TraceRequest]:
    """All requests of several traces by arrival."""
    return sorted(itertools.chain(*traces), key=lambda request: request.arrival_s)


def until(trace: Iterable[TraceRequest], duration_s: float) -> list[TraceRequest]:
    """Those that arrive within the first `duration_s` seconds."""
    return [request for request in trace if request.arrival_s <= duration_s]


def _adapters(spec: TraceSpec) -> np.ndarray:
    if not spec.adapters:
        return np.full(spec.requests, NO_ADAPTER)
    weights = np.arange(1, spec.adapters + 1, dtype=np.float64) ** -spec.alpha
    random = np.random.RandomState(spec.seed + 1)
    return random.choice(spec.adapters, size=spec.requests, p=weights / weights.sum())


def _arrivals(spec: TraceSpec) -> np.ndarray:
    shape = 1.0 / spec.cv**2
    random = np.random.RandomState(spec.seed + 2)
    gaps = random.gamma(shape, 1.0 / (spec.rate * shape), size=spec.requests)
    return _warped(np.cumsum(gaps), spec.bursts).round(4)


def _warped(unhurried_s: np.ndarray, bursts: Sequence[Burst]) -> np.ndarray:
    """When what would come at `unhurried_s` comes, if time runs faster during the bursts."""
    if not bursts:
        return unhurried_s
    ends = {0.0, *(b.start_s for b in bursts), *(b.start_s + b.duration_s for b in bursts)}
    edges = sorted(ends | {max(ends) + float(unhurried_s[-1]) + 1.0})
    passed = [0.0]
    for start, end in itertools.pairwise(edges):
        speed = np.prod([b.factor for b in bursts if b.start_s <= start < b.start_s + b.duration_s])
        passed.append(passed[-1] + float(speed) * (end - start))
    return np.asarray(np.interp(unhurried_s, passed, edges))


def _tenants(spec: TraceSpec) -> Sequence[str]:
    names = list(spec.tenants)
    if len(names) == 1:
        return names * spec.requests
    shares = np.array([spec.tenants[name] for name in names])
    random = np.random.RandomState(spec.seed + 3)
    chosen = random.choice(len(names), size=spec.requests, p=shares / shares.sum())
    return [names[i] for i in chosen]
