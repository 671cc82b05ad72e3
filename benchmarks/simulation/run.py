"""A trace through simulated workers under given policies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import StepCosts
from benchmarks.simulation.router import SimulatedAdapter, SimulatedRouter
from benchmarks.simulation.worker import SimulatedWorker, WorkerLimits
from lorry.client.bench.record import Record, Slo
from lorry.client.bench.trace import NO_ADAPTER, TraceRequest
from lorry.router.actions import Submit
from lorry.router.dispatcher import Dispatcher
from lorry.router.places import Amount, Places
from lorry.router.policies import Policies, make_policies
from lorry.router.policy_options import PolicyOptions

MAX_QUEUED = Amount(1 << 30, 1 << 50)
NO_OBJECTIVE, LIMITS, OPTIONS = Slo(), WorkerLimits(), PolicyOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a trace runs on."""

    costs: StepCosts
    limits: WorkerLimits = LIMITS
    ranks: Sequence[int] = (16,)  # of adapters in turn
    bytes_per_rank: int = 1 << 20
    num_workers: int = 1
    options: PolicyOptions = OPTIONS
    weights: Mapping[str, float] = field(default_factory=dict)  # of tenants
    max_prefetch: int = 32
    slo: Slo = NO_OBJECTIVE
    tenant_slos: Mapping[str, Slo] = field(default_factory=dict)  # of those who have their own

    def adapter_of(self, request: TraceRequest) -> SimulatedAdapter:
        """Each tenant has adapters of its own."""
        if request.adapter == NO_ADAPTER:
            return SimulatedAdapter(b"")
        rank = self.ranks[request.adapter % len(self.ranks)]
        version = f"{request.tenant}/{request.adapter}".encode()
        return SimulatedAdapter(version, rank, rank * self.bytes_per_rank)


class Simulation:
    """Requests arrive at their times; the run ends when the last one has."""

    def __init__(
        self,
        setting: Setting,
        trace: Sequence[TraceRequest],
        *,
        policies: Policies | None = None,
        on_submit: Callable[[Submit], None] = lambda submit: None,
        on_progress: Callable[[int], None] = lambda ended: None,
    ) -> None:
        self.clock = Clock()
        self._setting = setting
        self._trace = trace
        self._on_progress = on_progress
        self._num_arrived = 0
        policies = policies or make_policies(
            setting.options, weight=lambda tenant: setting.weights.get(tenant, 1.0)
        )
        places = Places(limit=MAX_QUEUED, tenant_limit=lambda tenant: MAX_QUEUED)
        self.dispatcher = Dispatcher(places, policies, max_prefetch=setting.max_prefetch)
        self.router = SimulatedRouter(self.clock, self.dispatcher, on_submit)
        self.workers = [
            SimulatedWorker(f"w{n}", self.clock, setting.costs, setting.limits, self.router)
            for n in range(setting.num_workers)
        ]
        for worker in self.workers:
            self.router.attach(worker)

    def run(self) -> list[Record]:
        """The records by request."""
        self._await_arrival()
        self.clock.run(self._is_done)
        assert len(self.router.records) == len(self._trace), "some requests never end"
        return sorted(self.router.records, key=lambda record: record.index)

    def _is_done(self) -> bool:
        ended = len(self.router.records)
        self._on_progress(ended)
        return ended == len(self._trace)

    def _await_arrival(self) -> None:
        if self._num_arrived < len(self._trace):
            self.clock.at(self._trace[self._num_arrived].arrival_s, self._arrive)

    def _arrive(self) -> None:
        index, request = self._num_arrived, self._trace[self._num_arrived]
        self._num_arrived += 1
        slo = self._setting.tenant_slos.get(request.tenant, self._setting.slo)
        record = Record(index, request, slo)
        self.router.arrive(record, self._setting.adapter_of(request))
        self._await_arrival()


def simulate(setting: Setting, trace: Sequence[TraceRequest]) -> list[Record]:
    return Simulation(setting, trace).run()
