"""Requests at a modelled worker, and what is to happen to them at the end of later steps."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Sequence:
    """One request at the worker."""

    seq: int
    version: bytes  # empty: the base model
    rank: int
    prompt_tokens: int  # and what was drawn before it came here
    output_tokens: int  # that it will draw
    drawn: int = 0  # up to `started_step`, while it decodes
    computed: int = 0  # tokens of the context, while it is a prompt
    pages: int = 0
    started_step: int = 0  # of its decoding
    life: int = 0  # counts admissions: what was planned for an earlier one is void
    is_running: bool = False
    is_decoding: bool = False

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + self.drawn

    @property
    def uncomputed(self) -> int:
        return self.context_tokens - self.computed


class Agenda:
    """What happens to whom at the end of which step, unless it has left the batch by then."""

    def __init__(self) -> None:
        self.step = 0  # steps that have ended
        self._later: dict[int, list[tuple[Callable[[Sequence], None], Sequence, int]]] = (
            defaultdict(list)
        )

    def after(self, steps: int, happen: Callable[[Sequence], None], sequence: Sequence) -> None:
        """At once if that is no step later."""
        if steps <= 0:
            happen(sequence)
        else:
            self._later[self.step + steps].append((happen, sequence, sequence.life))

    def fulfil(self) -> None:
        """What was to happen by now."""
        for happen, sequence, life in self._later.pop(self.step, ()):
            if sequence.life == life and sequence.is_running:
                happen(sequence)
