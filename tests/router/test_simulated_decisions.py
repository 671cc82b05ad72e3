"""The simulator's router decides as the live one: the same submits in the same order.

A simulated run is written down as what arrives and what workers tell, in order. Then clients and
workers tell the same to a real router over gRPC, each once the router has sent what it sent in the
simulation before.
"""

import asyncio
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.router import SimulatedAdapter, SimulatedRouter
from benchmarks.simulation.worker import SimulatedWorker, WorkerLimits
from lorry.client.bench.lengths import Uniform
from lorry.client.bench.record import Record
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace
from lorry.router.actions import Submit
from lorry.router.dispatcher import Dispatcher
from lorry.router.places import Amount, Places
from lorry.router.policies import make_policies
from lorry.router.policy_options import PolicyOptions
from lorry.router.request import RequestState
from lorry.router.worker import Worker, WorkerStatus
from lorry.v1 import common_pb2
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1 import worker_service_pb2 as worker_pb
from tests.support.byte_model import tokens_of
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import LENGTH
from tests.support.router_stack import Answer, Stack, router_stack
from tests.support.waiting import until

ADAPTERS = 5
OPTIONS: dict[str, Any] = {"fairness": "adapters", "cluster_adapters": 2, "cluster_wait_s": 60.0}
LIMITS = WorkerLimits(max_running=3, max_waiting=1, fetch_s=0.02)
COSTS = LinearCosts(step_ms=10.0, row_ms=0.1, kv_token_ms=0.0, rank_ms=0.1)
WINDOW = LIMITS.max_running + LIMITS.max_waiting
TOKEN = tokens_of("a")[0]
Event = tuple[Any, ...]


def version_of(adapter: int) -> bytes:
    return f"version {adapter}".encode()


class Written(SimulatedRouter):
    """Writes down what it is told and what it decides; what a worker tells at once is one event."""

    def __init__(self, clock: Clock, dispatcher: Dispatcher) -> None:
        super().__init__(clock, dispatcher, self.note_submit)
        self.clock = clock
        self.script: list[Event] = []

    def note_submit(self, submit: Submit) -> None:
        self.script.append(("submit", submit.worker.name, submit.request.generation.request_id))

    def arrive(self, record: Record, adapter: SimulatedAdapter) -> None:
        self.script.append(("arrive", record.index, record.planned))
        super().arrive(record, adapter)

    def first_token(self, worker_name: str, seq: int) -> None:
        self.note_step(worker_name, "draw", seq, 1)
        super().first_token(worker_name, seq)

    def more_tokens(self, worker_name: str, seq: int, count: int) -> None:
        self.note_step(worker_name, "draw", seq, count)
        super().more_tokens(worker_name, seq, count)

    def ended(self, worker_name: str, seq: int) -> None:
        request = self._attached[worker_name].active[seq]
        left = request.max_tokens - len(request.output_ids)
        self.note_step(worker_name, "end", seq, left)
        super().ended(worker_name, seq)

    def resident(self, worker_name: str, version: bytes, *, is_resident: bool) -> None:
        self.script.append(("resident", worker_name, version))
        super().resident(worker_name, version, is_resident=is_resident)

    def note_step(self, *told: Any) -> None:
        name, *what = told
        last = self.script[-1]
        if last[:3] == ("step", name, self.clock.now_s):
            last[3].append(what)
        else:
            self.script.append(("step", name, self.clock.now_s, [what]))


class WrittenDispatcher(Dispatcher):
    def hear(self, worker: Worker, status: WorkerStatus, now_s: float) -> None:
        self.script.append(("status", worker.name, status))
        super().hear(worker, status, now_s)

    script: list[Event]


def simulated(trace: Sequence[TraceRequest], names: Sequence[str]) -> list[Event]:
    """The script of a run."""
    clock, many = Clock(), Amount(10_000, 10_000_000)
    dispatcher = WrittenDispatcher(
        Places(limit=many, tenant_limit=lambda tenant: many),
        make_policies(PolicyOptions(**OPTIONS)),
        max_prefetch=32,
    )
    router = Written(clock, dispatcher)
    dispatcher.script = router.script
    for name in names:
        router.attach(SimulatedWorker(name, clock, COSTS, LIMITS, router))
    for index, planned in enumerate(trace):
        adapter = SimulatedAdapter(version_of(planned.adapter), 8, 8 << 20)
        record = Record(index, planned)
        clock.at(planned.arrival_s, functools.partial(router.arrive, record, adapter))
    clock.run(lambda: len(router.records) == len(trace))
    return router.script


async def replay(script: Sequence[Event], stack: Stack) -> list[asyncio.Task[Answer]]:
    """Tell the live router what the simulated one was told; returns the clients."""
    live = Live(stack)
    num_submits = 0
    for kind, *event in script:
        if kind == "submit":
            num_submits += 1
            continue
        await live.has_sent(num_submits)
        match kind, event:
            case "arrive", (index, planned):
                await live.arrive(index, planned)
            case "step", (name, _, told):
                await live.step(name, told)
            case "resident", (name, version):
                await live.resident(name, version)
            case "status", (name, status):
                await live.status(name, status)
    await live.has_sent(num_submits)
    return live.clients


class Live:
    """The router over gRPC; each method returns once the router has taken what it was told."""

    def __init__(self, stack: Stack) -> None:
        self.clients: list[asyncio.Task[Answer]] = []
        self._stack = stack
        self._fakes = {fake.address: fake for fake in stack.workers}
        self._num_finished = Counter[str]()
        self._dispatcher = stack.running.router._dispatcher

    async def has_sent(self, num_submits: int) -> None:
        workers = self._stack.workers
        await until(lambda: sum(len(fake.submits) for fake in workers) >= num_submits)

    async def arrive(self, index: int, planned: TraceRequest) -> None:
        spec = pb.GenerationSpec(
            request_id=str(index),
            adapter=f"adapters/a{planned.adapter}",
            token_ids=common_pb2.TokenIds(ids=[TOKEN] * planned.prompt_tokens),
            stopping=common_pb2.StoppingOptions(max_tokens=planned.output_tokens, ignore_eos=True),
        )
        self.clients.append(asyncio.create_task(self._stack.stream(spec)))
        await until(lambda: self._is_queued(str(index)))

    async def step(self, name: str, told: Sequence[tuple[str, int, int]]) -> None:
        fake, worker = self._fakes[name], self._worker(name)
        seqs = [seq for _, seq, count in told for _ in range(count)]
        ended = [seq for kind, seq, _ in told if kind == "end"]
        expected = {seq: len(worker.active[seq].output_ids) + seqs.count(seq) for seq in seqs}
        for seq in ended:
            del fake.active[seq]
        self._num_finished[name] += len(ended)
        fake.step(
            seqs=seqs,
            token_ids=[TOKEN] * len(seqs),
            finished=[worker_pb.Finished(seq=seq, reason=LENGTH) for seq in ended],
            submit_limit=WINDOW + self._num_finished[name],
        )
        going = set(expected) - set(ended)
        await until(
            lambda: (
                not set(ended) & set(worker.active)
                and all(len(worker.active[seq].output_ids) == expected[seq] for seq in going)
            )
        )

    async def resident(self, name: str, version: bytes) -> None:
        residency = worker_pb.Residency(gpu_added=[version], host_added=[version])
        self._fakes[name].send(worker_pb.AttachResponse(residency=residency))
        await until(lambda: version in self._worker(name).gpu)

    async def status(self, name: str, status: WorkerStatus) -> None:
        message = worker_pb.WorkerStatus(
            running=status.running,
            waiting=status.waiting,
            queued_prompt_tokens=status.queued_prompt_tokens,
            pages_total=status.pages_total,
            pages_free=status.pages_free,
            pages_adapter=status.pages_adapter,
            pages_adapter_idle=status.pages_adapter_idle,
            prefill_tokens_per_s=status.prefill_tokens_per_s,
            step_times=[
                worker_pb.StepTime(rows=rows, ms=seconds * 1e3) for rows, seconds in status.step_s
            ],
            adapter_load_bytes_per_s=status.adapter_load_bytes_per_s,
        )
        before = self._worker(name).status
        self._fakes[name].send(worker_pb.AttachResponse(status=message))
        await until(lambda: self._worker(name).status is not before)

    def _worker(self, name: str) -> Worker:
        return next(worker for worker in self._dispatcher.workers if worker.name == name)

    def _is_queued(self, request_id: str) -> bool:
        return any(
            request.generation.request_id == request_id
            and request.state is not RequestState.RECEIVED
            for request in self._dispatcher.requests
        )


async def test_a_live_router_decides_as_the_simulated_one(model: Path) -> None:
    store = FakeStore()
    for adapter in range(ADAPTERS):
        store.publish(f"tenants/default/adapters/a{adapter}", version_of(adapter))
    trace = make_trace(
        TraceSpec(
            requests=40,
            adapters=ADAPTERS,
            rate=12.0,
            prompt_tokens=Uniform(4, 60),
            output_tokens=Uniform(1, 40),
        )
    )
    async with router_stack(
        model,
        num_workers=2,
        store=store,
        worker={
            "submit_limit": WINDOW,
            "max_running": LIMITS.max_running,
            "step_tokens": LIMITS.step_tokens,
            "heartbeat_s": 3600.0,
        },
        worker_silence_s=600.0,
        **OPTIONS,
    ) as stack:
        script = simulated(trace, [fake.address for fake in stack.workers])
        clients = await replay(script, stack)
        answers = await asyncio.gather(*clients)
        stack.check_idle()
    assert sum(kind == "submit" for kind, *_ in script) == len(trace)
    for fake in stack.workers:
        simulated_ids = [row[2] for row in script if row[:2] == ("submit", fake.address)]
        assert len(simulated_ids) > 5
        assert [submit.request_id for submit in fake.submits] == simulated_ids
    assert [len(a.token_ids) for a in answers] == [r.output_tokens for r in trace]
