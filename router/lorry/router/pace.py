"""How fast one worker begins requests, beside how fast it says that it computes prompts."""

import math

MEMORY_S = 3.0  # of contention: what lies longer back counts less than a third
PRIOR_TOKENS = 2048.0  # by which a worker is first believed to keep its own rate
LEAST_SHARE = 0.01


class Pace:
    """The share of its prompt rate at which a worker begins requests while some wait there.

    It is less than 1 where memory, adapters or decoding sequences hold them up. Measured only in
    contention, while requests wait that steps have passed over: one that begins with the next step
    says nothing of how many more could have.
    """

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._contended_s = -math.inf  # when it was in contention last
        self._begun_tokens = PRIOR_TOKENS
        self._possible_tokens = PRIOR_TOKENS

    @property
    def share(self) -> float:
        return max(LEAST_SHARE, min(1.0, self._begun_tokens / self._possible_tokens))

    def advance(self, now_s: float, *, contended: bool, tokens_per_s: float) -> None:
        """Time has passed; `contended` tells whether in contention, and the rate is its own."""
        elapsed_s, self._since_s = now_s - self._since_s, now_s
        if not contended:
            return
        self._contended_s = now_s
        left = math.exp(-elapsed_s / MEMORY_S)
        self._begun_tokens *= left
        possible = tokens_per_s * MEMORY_S * (1.0 - left)
        self._possible_tokens = self._possible_tokens * left + possible

    def begin(self, num_tokens: int, now_s: float) -> None:
        """A prompt was computed, in contention if the first one of its step was."""
        if self._contended_s == now_s:
            self._begun_tokens += num_tokens
