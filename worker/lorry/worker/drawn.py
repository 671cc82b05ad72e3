"""What a step drew, as it is read back from the device.

Shape suffixes: N = rows that sample, X = alternatives.
"""

from typing import NamedTuple

import numpy as np

from lorry.worker.messages import TokenLogprobs


class DrawnLogprobs(NamedTuple):
    """Raw logprobs; rows hold anything where they have not asked, or beyond `num_top_N`."""

    num_top_N: np.ndarray  # alternatives asked for, or NOT_ASKED
    chosen_N: np.ndarray  # float32
    top_id_NX: np.ndarray  # most likely first
    top_logprob_NX: np.ndarray  # float32

    def part(self, rows: np.ndarray | slice) -> "DrawnLogprobs":
        return DrawnLogprobs(*(values[rows] for values in self))

    def to_message(self) -> TokenLogprobs | None:
        """None if no row asked."""
        asked_N = self.num_top_N >= 0
        if not asked_N.any():
            return None
        is_top_NX = np.arange(self.top_id_NX.shape[1]) < self.num_top_N[:, None]
        return TokenLogprobs(
            logprobs=np.where(asked_N, self.chosen_N, 0).tolist(),
            top_counts=self.num_top_N.tolist(),
            top_token_ids=self.top_id_NX[is_top_NX].tolist(),
            top_logprobs=self.top_logprob_NX[is_top_NX].tolist(),
        )


class Drawn(NamedTuple):
    """One token for each row that samples."""

    token_id_N: np.ndarray  # int32
    logprobs: DrawnLogprobs | None = None  # None where no row asked for any
    prompt: DrawnLogprobs | None = None  # of prompt rows, for which nothing is drawn

    def only(self, is_kept_N: np.ndarray) -> tuple[np.ndarray, DrawnLogprobs | None]:
        """Tokens and logprobs of some of the rows that sample."""
        logprobs = self.logprobs
        return self.token_id_N[is_kept_N], logprobs and logprobs.part(is_kept_N)
