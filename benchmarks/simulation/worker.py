"""A modelled worker: the engine's scheduling in as few words as give its steps and times.

As in `lorry.worker.scheduler`, a step decodes every running sequence, then continues prompts, then
admits waiting requests in order, passing over those whose adapter is not resident yet; only growth
preempts, the newest first. What happens alike in every step of a sequence is not done step by step:
a sequence is looked at where it needs a page, where 16 of its tokens are told to the router, and
where it ends.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from benchmarks.simulation.adapters import AdapterCache, AdapterEvents, Pool
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import StepCosts
from benchmarks.simulation.measures import Measures, WorkerCounts
from benchmarks.simulation.sequences import Agenda, Sequence

PAGE_TOKENS = 16
TOLD_TOKENS = 16  # that a sequence draws before the router hears of them; of the first at once


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    step_tokens: int = 1024
    max_running: int = 512
    max_waiting: int = 64
    pool_pages: int = 1 << 30
    page_bytes: int = 1 << 21
    load_bytes_per_s: float = 35e9  # from host memory into the pool
    fetch_s: float = 0.005  # until an image that was never here is in host memory


class WorkerEvents(AdapterEvents, Protocol):
    """Who hears what a worker's step brought."""

    def first_token(self, worker_name: str, seq: int) -> None: ...
    def more_tokens(self, worker_name: str, seq: int, count: int) -> None: ...
    def ended(self, worker_name: str, seq: int) -> None: ...


class SimulatedWorker:
    """A step is one event: it begins with a plan and ends with what it drew."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        costs: StepCosts,
        limits: WorkerLimits,
        events: WorkerEvents,
    ) -> None:
        self.name = name
        self.limits = limits
        self.counts = WorkerCounts()
        self.pool = Pool(limits.pool_pages)
        self.adapters = AdapterCache(
            name,
            clock,
            self.pool,
            events,
            page_bytes=limits.page_bytes,
            load_bytes_per_s=limits.load_bytes_per_s,
            fetch_s=limits.fetch_s,
            when_loaded=self._step_soon,
        )
        self.slowness = 1.0  # by which every step takes longer
        self.is_alive = True
        self.waiting: deque[Sequence] = deque()  # by seq
        self.measures = Measures()
        self._clock = clock
        self._costs = costs
        self._events = events
        self._sequences: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}  # by seq, in order of admission
        self._prefilling: list[Sequence] = []
        self._num_decoding = 0
        self._kv_tokens = 0  # of decoding sequences
        self._growing: list[tuple[Sequence, int]] = []  # that need a page, and their life
        self._agenda = Agenda()
        self._is_stepping = False

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def window(self) -> int:
        """Unfinished requests that a router may have sent."""
        return self.limits.max_running + self.limits.max_waiting

    @property
    def queued_prompt_tokens(self) -> int:
        return sum(s.uncomputed for s in (*self._prefilling, *self.waiting))

    def submit(self, sequence: Sequence, adapter_bytes: int) -> None:
        """Raises ValueError for a request that its pool can never hold."""
        self.adapters.sizes[sequence.version] = adapter_bytes
        tokens = sequence.prompt_tokens + sequence.output_tokens
        pages = -(-tokens // PAGE_TOKENS) + self.adapters.num_pages(sequence.version)
        if pages > self.limits.pool_pages:
            raise ValueError(f"{tokens} tokens and their adapter exceed the pool of {self.name}")
        self._sequences[sequence.seq] = sequence
        self.waiting.append(sequence)
        self._step_soon()

    def cancel(self, seq: int) -> None:
        """Free all that it holds; nothing more is told of it."""
        sequence = self._sequences.pop(seq, None)
        if sequence is not None and sequence.is_running:
            self._stop(sequence)
        elif sequence is not None:
            self.waiting.remove(sequence)

    def prefetch(self, versions: Iterable[bytes], sizes: dict[bytes, int]) -> None:
        self.adapters.sizes |= sizes
        self.adapters.wanted = tuple(versions)
        self._step_soon()

    def die(self) -> None:
        """Nothing more is heard of it."""
        self.is_alive = False

    def check_integrity(self) -> None:
        running = self._running.values()
        kv_pages = sum(sequence.pages for sequence in running)
        assert self.pool.free + kv_pages + self.adapters.pages == self.limits.pool_pages
        assert self.pool.free >= 0
        self.adapters.check_integrity(sequence.version for sequence in running)
        assert len(self._running) + len(self.waiting) == len(self._sequences)
        decoding = [sequence for sequence in running if sequence.is_decoding]
        assert len(decoding) == self._num_decoding
        drawn = sum(map(self._drawn_by_now, decoding))
        assert self._kv_tokens == drawn + sum(sequence.prompt_tokens for sequence in decoding)

    def _step_soon(self) -> None:
        if not self._is_stepping and self.is_alive:
            self._is_stepping = True
            self._clock.at(self._clock.now_s, self._begin_step)

    def _begin_step(self) -> None:
        """Plan a step, and have it end when it has taken its time."""
        if not self.is_alive:
            return
        self.adapters.step = self._agenda.step
        self._grow()
        chunks = self._continue_prompts(self.limits.step_tokens - self._num_decoding)
        self._admit(chunks)
        self.adapters.load_ahead(self.num_running)
        prompt_tokens = sum(count for _, count in chunks)
        rows = self._num_decoding + prompt_tokens
        if not rows:
            self._is_stepping = False  # until a request or an adapter comes
            return
        seconds = self.slowness * self._costs.step_s(
            rows=rows,
            sampled=self._num_decoding + sum(s.uncomputed == count for s, count in chunks),
            kv_tokens=self._kv_tokens,
            rank_sum=self.adapters.rank_sum,
        )
        self.counts.steps += 1
        self.counts.busy_s += seconds
        self.measures.note(rows, seconds, has_prompts=prompt_tokens > 0)
        self._clock.at(self._clock.now_s + seconds, lambda: self._end_step(chunks))

    def _end_step(self, chunks: list[tuple[Sequence, int]]) -> None:
        if not self.is_alive:
            return
        self._agenda.step += 1
        self._kv_tokens += self._num_decoding
        self.counts.output_tokens += self._num_decoding
        for sequence, count in chunks:
            if sequence.is_running:  # it was not cancelled meanwhile
                self._note_chunk(sequence, count)
        self._agenda.fulfil()
        self._begin_step()

    def _continue_prompts(self, left: int) -> list[tuple[Sequence, int]]:
        """Sequences and how many tokens of their prompts the step computes."""
        chunks = []
        for sequence in self._prefilling:
            count = min(left, sequence.uncomputed)
            if count <= 0:
                break
            chunks.append((sequence, count))
            left -= count
        return chunks

    def _admit(self, chunks: list[tuple[Sequence, int]]) -> None:
        """Start waiting requests that fit, the oldest first."""
        left = self.limits.step_tokens - self._num_decoding - sum(count for _, count in chunks)
        passed_over = list[Sequence]()
        while left > 0 and self.waiting and self.num_running < self.limits.max_running:
            sequence = self.waiting.popleft()
            if not self._start(sequence):
                passed_over.append(sequence)
                continue
            count = min(left, sequence.uncomputed)
            chunks.append((sequence, count))
            left -= count
        self.waiting.extendleft(reversed(passed_over))

    def _start(self, sequence: Sequence) -> bool:
        """Admit a request if its adapter is resident and there are pages for its context."""
        watermark = self.num_running
        if sequence.version and not self.adapters.want(sequence.version, watermark):
            return False
        pages = -(-sequence.context_tokens // PAGE_TOKENS)
        if not self.adapters.make_room(pages + watermark):
            return False
        self.pool.free -= pages
        sequence.pages, sequence.is_running = pages, True
        sequence.life += 1
        self._running[sequence.seq] = sequence
        self._prefilling.append(sequence)
        self.adapters.acquire(sequence.version, sequence.rank)
        return True

    def _note_chunk(self, sequence: Sequence, count: int) -> None:
        sequence.computed += count
        self.counts.prompt_tokens += count
        if sequence.uncomputed:
            return
        self._prefilling.remove(sequence)
        sequence.is_decoding, sequence.started_step = True, self._agenda.step
        is_first, sequence.drawn = not sequence.drawn, sequence.drawn + 1
        self.counts.output_tokens += 1
        self._num_decoding += 1
        self._kv_tokens += sequence.context_tokens
        if is_first:
            self._events.first_token(self.name, sequence.seq)
        left = sequence.output_tokens - sequence.drawn
        if left <= 0:
            self._end(sequence)
            return
        self._agenda.after(left, self._end, sequence)
        self._agenda.after(
            sequence.pages * PAGE_TOKENS - sequence.context_tokens + 1, self._want_page, sequence
        )
        self._agenda.after(TOLD_TOKENS - 1, self._tell_first, sequence)

    def _tell_first(self, sequence: Sequence) -> None:
        self._events.more_tokens(self.name, sequence.seq, TOLD_TOKENS - 1)
        self._agenda.after(TOLD_TOKENS, self._tell, sequence)

    def _tell(self, sequence: Sequence) -> None:
        self._events.more_tokens(self.name, sequence.seq, TOLD_TOKENS)
        self._agenda.after(TOLD_TOKENS, self._tell, sequence)

    def _want_page(self, sequence: Sequence) -> None:
        self._growing.append((sequence, sequence.life))
        self._agenda.after(PAGE_TOKENS, self._want_page, sequence)

    def _end(self, sequence: Sequence) -> None:
        self._stop(sequence)
        del self._sequences[sequence.seq]
        self._events.ended(self.name, sequence.seq)

    def _grow(self) -> None:
        """A page for each sequence that needs one, if need be the newest sequence's."""
        for sequence, life in self._growing:
            while sequence.is_running and sequence.life == life:
                if self.adapters.make_room(1):
                    self.pool.free -= 1
                    sequence.pages += 1
                    break
                self._preempt(next(reversed(self._running.values())))
        self._growing.clear()

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.counts.preemptions += 1
        place = sum(other.seq < sequence.seq for other in self.waiting)
        self.waiting.insert(place, sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Leave the batch."""
        if sequence.is_decoding:
            sequence.drawn = self._drawn_by_now(sequence)
            self._num_decoding -= 1
            self._kv_tokens -= sequence.context_tokens
        else:
            self._prefilling.remove(sequence)
        sequence.is_running = sequence.is_decoding = False
        del self._running[sequence.seq]
        self.pool.free += sequence.pages
        sequence.pages = sequence.computed = 0
        self.adapters.release(sequence.version, sequence.rank)

    def _drawn_by_now(self, sequence: Sequence) -> int:
        return sequence.drawn + self._agenda.step - sequence.started_step
