"""Tensor-parallel ranks as threads of which one runs at a time, until its next collective.

For what cannot run in two threads at once, as Triton's interpreter.
"""

import threading
from collections import defaultdict
from collections.abc import Callable

import torch

TIMEOUT_S = 120.0


class TurnCollectives:
    """Of one of the ranks; see `Collectives`."""

    def __init__(self, turns: "Turns", rank: int) -> None:
        self._turns, self._rank = turns, rank

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._turns.exchange(self._rank, x)).sum(dim=0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._turns.exchange(self._rank, x))

    def share(self, num_bytes: int) -> None:
        return None


class Turns:
    def __init__(self, size: int) -> None:
        self.size = size
        self._turn = 0
        self._changed = threading.Condition()
        self._rounds: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._num_calls = [0] * size
        self._failures: list[BaseException] = []

    def run(self, of_rank: Callable[[int, TurnCollectives], None]) -> None:
        """Call `of_rank` for each rank; raises what one of them raises."""
        threads = [
            threading.Thread(target=self._run, args=(of_rank, rank)) for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor of this call."""
        call = self._num_calls[rank]
        self._num_calls[rank] += 1
        self._rounds[call].append(x.clone())
        self._pass_turn()
        self._wait_for_turn(rank)
        return self._rounds[call]

    def _run(self, of_rank: Callable[[int, TurnCollectives], None], rank: int) -> None:
        try:
            self._wait_for_turn(rank)
            of_rank(rank, TurnCollectives(self, rank))
        except BaseException as error:
            self._failures.append(error)
        self._pass_turn()

    def _pass_turn(self) -> None:
        with self._changed:
            self._turn = (self._turn + 1) % self.size
            self._changed.notify_all()

    def _wait_for_turn(self, rank: int) -> None:
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._turn == rank or bool(self._failures), TIMEOUT_S
            )
        if self._failures or not came:
            raise RuntimeError("another rank failed")
