"""The engine: takes commands, runs steps, reports what happened. It knows no gRPC and no ring."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lorry.worker import messages as m
from lorry.worker.gauges import Gauges
from lorry.worker.plan import Batch, Plan
from lorry.worker.prompt_rows import prompt_messages
from lorry.worker.residency import Adapter, AdapterState
from lorry.worker.runner import ReadTokens, Runner
from lorry.worker.scheduler import Scheduler

Clock = Callable[[], float]


class _Launched(NamedTuple):
    batch: Batch
    read: ReadTokens
    started_s: float


@dataclass(slots=True)
class HostTime:
    """What the host spent on steps; plan and commit are the scheduler's part."""

    plan_s: float = 0.0
    launch_s: float = 0.0
    commit_s: float = 0.0


class Engine:
    """One pool, one model, one scheduler; every method returns at once but `step`."""

    def __init__(self, runner: Runner, scheduler: Scheduler, clock: Clock = time.monotonic) -> None:
        self.scheduler = scheduler
        self.gauges = Gauges()
        self.host_time = HostTime()
        self.runner = runner
        self._clock = clock
        self._in_flight: deque[_Launched] = deque()
        self._reclaims: set[bytes] = set()  # of images that a load still reads
        self._pin_calls: dict[int, bytes] = {}
        self._evict_calls: dict[int, bytes] = {}  # of versions that are on their way
        self._events: list[m.Event] = []
        self._fetched: dict[bytes, str] = {}  # source of images that were not loaded yet
        self._loads_under_way = 0
        self._computed = False  # by the last step
        self._last_read_s = 0.0
        self._handlers: dict[type[m.Message], Callable[..., None]] = {
            m.Submit: self._submit,
            m.Cancel: self._cancel,
            m.Prefetch: self._prefetch,
            m.ImageReady: self._image_ready,
            m.ImageFailed: self._image_failed,
            m.ReclaimImage: self._reclaim_image,
            m.PinAdapter: self._pin,
            m.UnpinAdapter: self._unpin,
            m.EvictAdapter: self._evict,
        }

    def handle(self, commands: Iterable[m.Command]) -> None:
        """Apply commands; what they cause is in the next `take_events`."""
        for command in commands:
            self._handlers[type(command)](command)

    def step(self) -> bool:
        """Plan and launch a step and read the one before; False if there was nothing to do."""
        self._finish_loads()
        self._answer_evictions()
        planning_s = self._clock()
        plan = self.scheduler.plan(planning_s, list(self._pin_calls.values()))
        self.host_time.plan_s += self._clock() - planning_s
        self._report(plan)
        for adapter in plan.loads:
            self.runner.adapters.begin_load(adapter)
        self._loads_under_way += len(plan.loads)
        self._answer_pins()
        self._launch(plan.batch)
        self._computed = plan.batch is not None
        if changes := self.scheduler.residency.take_changes():
            self._events.append(changes)
        return bool(plan.batch or self._loads_under_way or self._in_flight)

    @property
    def awaits_only_loads(self) -> bool:
        """Whether nothing is computed and adapters are on their way to the device."""
        return self._loads_under_way > 0 and not self._in_flight and not self._computed

    def take_events(self) -> list[m.Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def status(self) -> m.Status:
        return self.gauges.status(self.scheduler, self.runner.counts)

    def _report(self, plan: Plan) -> None:
        self._events.extend(plan.finished)
        self._events.extend(m.FetchImage(version) for version in plan.fetches)
        self.gauges.adapter_evictions += len(plan.evicted)

    def _finish_loads(self) -> None:
        for adapter, num_bytes, seconds in self.runner.adapters.finished_loads():
            self.scheduler.residency.finish_load(adapter, self._clock())
            source = self._fetched.pop(adapter.version, "host")
            self.gauges.note_load(source, num_bytes, seconds)
            self._loads_under_way -= 1
            if adapter.version in self._reclaims:
                self._reclaims.remove(adapter.version)
                self._give_up_image(adapter)

    def _launch(self, batch: Batch | None) -> None:
        """Launch a step, then read results until the runner may take another one."""
        if batch is not None:
            started_s = self._clock()
            read = self.runner.launch(batch, self.scheduler.table)
            self.host_time.launch_s += self._clock() - started_s
            self._in_flight.append(_Launched(batch, read, started_s))
        keep = self.runner.max_in_flight - 1 if batch is not None else 0
        while len(self._in_flight) > keep:
            self._read(self._in_flight.popleft())

    def _read(self, launched: "_Launched") -> None:
        drawn = launched.read()
        now_s = self._clock()
        if launched.batch.prompt is not None and drawn.prompt is not None:
            self._events += prompt_messages(
                launched.batch.prompt, drawn.prompt, self.scheduler.table
            )
        tokens, finished = self.scheduler.commit(launched.batch, drawn, now_s)
        self.host_time.commit_s += self._clock() - now_s
        # Steps overlap: a step's time is what passed since the one before was read.
        started_s = max(launched.started_s, self._last_read_s)
        self.gauges.note_step(launched.batch, max(now_s - started_s, 1e-9))
        self._last_read_s = now_s
        if tokens.requests:
            self._events.append(tokens)
        self._events.extend(finished)

    # Commands

    def _submit(self, submit: m.Submit) -> None:
        if refused := self.scheduler.submit(submit, self._clock()):
            self._events.append(refused)

    def _cancel(self, cancel: m.Cancel) -> None:
        self._events.extend(self.scheduler.cancel(cancel.requests))

    def _prefetch(self, prefetch: m.Prefetch) -> None:
        self.scheduler.set_prefetch(prefetch.versions)

    def _image_ready(self, image: m.ImageReady) -> None:
        adapter = self.scheduler.residency.find(image.version)
        if adapter is None or adapter.state is not AdapterState.FETCHING:
            self._events.append(m.ReleaseImage(image.version))
            return
        try:
            self.runner.adapters.map(image)
        except (OSError, ValueError) as error:
            failure = m.Failure("STORE_UNAVAILABLE", f"the page image cannot be mapped: {error}")
            self._fail(adapter, failure)
            self._events.append(m.ReleaseImage(image.version))
            return
        self.scheduler.finish_fetch(adapter, image)
        self._fetched[image.version] = "chunks" if image.copied else "shm"

    def _image_failed(self, failed: m.ImageFailed) -> None:
        adapter = self.scheduler.residency.find(failed.version)
        if adapter is not None and adapter.state is AdapterState.FETCHING:
            self._fail(adapter, failed.failure)

    def _reclaim_image(self, reclaim: m.ReclaimImage) -> None:
        adapter = self.scheduler.residency.find(reclaim.version)
        if adapter is None or adapter.image is None:
            return
        if adapter.state is AdapterState.LOADING:
            self._reclaims.add(reclaim.version)
        else:
            self._give_up_image(adapter)

    def _pin(self, pin: m.PinAdapter) -> None:
        self._pin_calls[pin.call] = pin.version

    def _unpin(self, unpin: m.UnpinAdapter) -> None:
        adapter = self.scheduler.residency.find(unpin.version)
        if adapter is not None and adapter.pinned:
            self.scheduler.residency.set_pinned(adapter, False)
        text = f"version {unpin.version.hex()} was unpinned before it was resident"
        self._refuse_pins(unpin.version, m.Failure("SUPERSEDED", text))
        self._events.append(m.AdminResult(unpin.call))

    def _evict(self, evict: m.EvictAdapter) -> None:
        self._evict_calls[evict.call] = evict.version
        self._answer_evictions()

    def _answer_evictions(self) -> None:
        """Evict what was asked for; a version on its way goes once it is here."""
        for call, version in list(self._evict_calls.items()):
            adapter = self.scheduler.residency.find(version)
            if adapter is not None and self._is_in_use(adapter):
                failure = m.Failure("ADAPTER_IN_USE", f"version {version.hex()} is in use")
                self._events.append(m.AdminResult(call, failure))
            elif adapter is None or not adapter.is_on_its_way:
                if adapter is not None:
                    self._give_up(adapter)
                self._events.append(m.AdminResult(call))
            else:
                continue
            del self._evict_calls[call]

    def _is_in_use(self, adapter: Adapter) -> bool:
        is_asked_for = adapter.version in self._pin_calls.values()
        return adapter.pinned or is_asked_for or adapter.references > 0

    def _give_up(self, adapter: Adapter) -> None:
        """Free its pages and its image."""
        if adapter.state is AdapterState.RESIDENT:
            self.scheduler.residency.evict(adapter)
            self.gauges.adapter_evictions += 1
        if adapter.image is not None:
            self._give_up_image(adapter)

    def _give_up_image(self, adapter: Adapter) -> None:
        self.runner.adapters.unmap(adapter.version)
        self._fetched.pop(adapter.version, None)
        self.scheduler.residency.drop_image(adapter)
        self._events.append(m.ReleaseImage(adapter.version))

    def _fail(self, adapter: Adapter, failure: m.Failure) -> None:
        self._events.extend(self.scheduler.fail_adapter(adapter, failure, self._clock()))
        self._refuse_pins(adapter.version, failure)

    def _refuse_pins(self, pinned: bytes, failure: m.Failure) -> None:
        for call, version in list(self._pin_calls.items()):
            if version == pinned:
                del self._pin_calls[call]
                self._events.append(m.AdminResult(call, failure))

    def _answer_pins(self) -> None:
        """A pin is kept once its adapter is resident, and refused if a load found no room."""
        for call, version in list(self._pin_calls.items()):
            adapter = self.scheduler.residency.find(version)
            if adapter is None or adapter.is_on_its_way:
                continue
            del self._pin_calls[call]
            if adapter.state is AdapterState.RESIDENT:
                self.scheduler.residency.set_pinned(adapter, True)
                self._events.append(m.AdminResult(call))
            else:
                text = f"the pool has no room for {adapter.num_pages} pages beside what is in use"
                self._events.append(m.AdminResult(call, m.Failure("POOL_TOO_SMALL", text)))
