"""What the engine asks of the device."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from lorry.worker.adapter_memory import AdapterMemory, RankAdapterMemory
from lorry.worker.drawn import Drawn
from lorry.worker.plan import Batch
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_work import StepWork


class RunCounts(NamedTuple):
    """How steps were run."""

    graph_replays: int
    eager_steps: int
    padded_rows: int  # computed for nothing


ReadTokens = Callable[[], Drawn]


class Runner(Protocol):
    """Runs steps in order; up to `max_in_flight` may be launched before the first is read."""

    max_in_flight: int

    @property
    def adapters(self) -> AdapterMemory: ...

    @property
    def counts(self) -> RunCounts: ...

    def launch(self, batch: Batch, table: SequenceTable) -> ReadTokens:
        """Start a step; the result waits for it and returns what it drew. A sequence whose newest
        token was not read yet continues from what the step before drew."""
        ...


class RankRunner(Runner, Protocol):
    """One whose steps other tensor-parallel ranks can run, too."""

    @property
    def adapters(self) -> RankAdapterMemory: ...

    def prepare(self, batch: Batch, table: SequenceTable) -> StepWork:
        """What a step needs of the host."""
        ...

    def run(self, work: StepWork) -> ReadTokens:
        """Start the step, as `launch` does."""
        ...
