"""What a step does by token ids: embed them, draw them, and tell how likely they were.

Tensor-parallel ranks hold consecutive ids each. They merge their best candidates, or sums over
their ids, and never a row of logits; then all ranks know what was drawn.

Shape suffixes: T = rows of the step, N = rows that sample, V = ids, those of one rank where the
vocabulary is split, H = hidden size, X = alternatives.
"""

from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import embedding, pad

from lorry.kernels.adjustments import (
    Adjustments,
    SequenceTables,
    adjust_reference,
    count_drawn,
)
from lorry.kernels.logprobs import MAX_TOP, logprobs_reference
from lorry.kernels.partition import Part
from lorry.kernels.sampling import best_reference, sample_reference
from lorry.kernels.truncation import truncation_reference
from lorry.worker.collectives import Collectives
from lorry.worker.drawn import DrawnLogprobs
from lorry.worker.shared_threshold import shared_threshold
from lorry.worker.step_input import SamplingInput


class Vocabulary(Protocol):
    @property
    def num_columns(self) -> int:
        """Columns of tables by token id."""
        ...

    def columns(self, token_ids: np.ndarray) -> np.ndarray:
        """Where ids are in such tables."""
        ...

    def embed(self, token_id_T: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor: ...

    def adjust(
        self, logits_NV: torch.Tensor, tables: SequenceTables, rows: Adjustments
    ) -> torch.Tensor:
        """Logits with penalties, biases and bans."""
        ...

    def count(self, tables: SequenceTables, rows: Adjustments, token_N: torch.Tensor) -> None:
        """Note drawn tokens for later penalties."""
        ...

    def draw(self, logits_NV: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
        """A token id for each row."""
        ...

    def report(
        self, logits_NV: torch.Tensor, token_N: torch.Tensor, num_top_N: torch.Tensor
    ) -> DrawnLogprobs | None:
        """Logprobs of the model's own logits, if a row asks for any."""
        ...


class WholeVocabulary:
    """Of a rank that is alone; see `Vocabulary`."""

    def __init__(self, size: int) -> None:
        self.num_columns = size

    def columns(self, token_ids: np.ndarray) -> np.ndarray:
        return token_ids

    def embed(self, token_id_T: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        return weight_VH[token_id_T]

    def adjust(
        self, logits_NV: torch.Tensor, tables: SequenceTables, rows: Adjustments
    ) -> torch.Tensor:
        return adjust_reference(logits_NV, tables, rows)

    def count(self, tables: SequenceTables, rows: Adjustments, token_N: torch.Tensor) -> None:
        count_drawn(tables, rows, token_N)

    def draw(self, logits_NV: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
        threshold_N = truncation_reference(
            logits_NV,
            sampling.temperature_N,
            sampling.top_k_N,
            sampling.top_p_N,
            sampling.min_p_N,
        )
        return sample_reference(
            logits_NV,
            sampling.temperature_N,
            sampling.seed_N,
            sampling.output_position_N,
            threshold_N,
        )

    def report(
        self, logits_NV: torch.Tensor, token_N: torch.Tensor, num_top_N: torch.Tensor
    ) -> DrawnLogprobs | None:
        if not (num_top_N >= 0).any():
            return None
        logprobs = logprobs_reference(logits_NV, token_N, num_top_N)
        return DrawnLogprobs(*(values.cpu().numpy() for values in (num_top_N, *logprobs)))


class SplitVocabulary:
    """Of one of several ranks; see `Vocabulary`."""

    def __init__(self, part: Part, collectives: Collectives) -> None:
        self._part = part
        self._collectives = collectives

    @property
    def num_columns(self) -> int:
        """The last one is for the ids of other ranks."""
        return self._part.width + 1

    def columns(self, token_ids: np.ndarray) -> np.ndarray:
        part = self._part
        is_own = (token_ids >= part.start) & (token_ids < part.stop)
        return np.where(is_own, token_ids - part.start, part.width)

    def embed(self, token_id_T: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        column_T, is_own_T = self._columns(token_id_T)
        x_TH = embedding(column_T.where(is_own_T, 0), weight_VH)
        return self._collectives.all_reduce(x_TH.masked_fill(~is_own_T[:, None], 0))

    def adjust(
        self, logits_NV: torch.Tensor, tables: SequenceTables, rows: Adjustments
    ) -> torch.Tensor:
        return adjust_reference(pad(logits_NV, (0, 1)), tables, rows)[:, :-1]

    def count(self, tables: SequenceTables, rows: Adjustments, token_N: torch.Tensor) -> None:
        count_drawn(tables, rows, self._columns(token_N)[0])

    def draw(self, logits_NV: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
        """Merges each rank's best score and its id; of equal scores the smallest id wins."""
        logits_NV = self._own(logits_NV)
        score_N, token_N = best_reference(
            logits_NV,
            sampling.temperature_N,
            sampling.seed_N,
            sampling.output_position_N,
            shared_threshold(logits_NV.float(), sampling, self._collectives),
            first_id=self._part.start,
        )
        # Float64 holds both exactly.
        pair_N2 = torch.stack([score_N.double(), token_N.double()], dim=1)
        score_KN, token_KN = self._collectives.all_gather(pair_N2).unbind(2)
        best_N = score_KN.argmax(dim=0, keepdim=True)
        return token_KN.gather(0, best_N)[0].long()

    def report(
        self, logits_NV: torch.Tensor, token_N: torch.Tensor, num_top_N: torch.Tensor
    ) -> DrawnLogprobs | None:
        if not (num_top_N >= 0).any():
            return None
        logits_NV = self._own(logits_NV).float()
        log_mass_KN = self._collectives.all_gather(logits_NV.logsumexp(dim=1))
        log_mass_N1 = log_mass_KN.logsumexp(dim=0)[:, None]
        column_N, is_own_N = self._columns(token_N)
        own_N = logits_NV.gather(1, column_N.where(is_own_N, 0)[:, None])[:, 0]
        chosen_N = self._collectives.all_reduce(own_N.masked_fill(~is_own_N, 0))
        id_NX, logit_NX = self._most_likely(logits_NV)
        return DrawnLogprobs(
            num_top_N.cpu().numpy(),
            (chosen_N - log_mass_N1[:, 0]).cpu().numpy(),
            id_NX.cpu().numpy(),
            (logit_NX - log_mass_N1).cpu().numpy(),
        )

    def _most_likely(self, logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and logits of the alternatives; of equal ones the smallest id comes first."""
        logit, column = logits_NV.sort(dim=1, descending=True, stable=True)
        pair_NX2 = torch.stack([logit, column + self._part.start], dim=2)[:, :MAX_TOP].double()
        all_KNX2 = self._collectives.all_gather(pair_NX2.contiguous())
        logit_NX, id_NX = all_KNX2.transpose(0, 1).flatten(1, 2).unbind(2)
        order_NX = logit_NX.argsort(dim=1, descending=True, stable=True)[:, :MAX_TOP]
        return id_NX.gather(1, order_NX).int(), logit_NX.gather(1, order_NX).float()

    def _own(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Logits without those of ids that no rank has."""
        return logits_NV[:, : self._part.length]

    def _columns(self, token_id_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of ids, and whether they are this rank's."""
        part = self._part
        is_own_T = (token_id_T >= part.start) & (token_id_T < part.stop)
        return (token_id_T - part.start).where(is_own_T, part.width), is_own_T
