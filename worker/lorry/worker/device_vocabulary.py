"""Draws on a GPU where the vocabulary may be split over tensor-parallel ranks.

Where only temperatures matter, ranks merge the best score of each and its id. What needs order or
sums over all ids, as top-p and logprobs do, is computed by every rank from all logits: a gather of
them is a call, and a search that tells numbers to and fro would be dozens.

Shape suffixes: N = rows that sample, V = ids, those of one rank where the vocabulary is split,
K = ranks.
"""

from typing import NamedTuple, Protocol

import torch

from lorry.kernels.partition import Part
from lorry.kernels.sampling import best, draw_best, sample
from lorry.worker.collectives import Collectives


class Noise(NamedTuple):
    """What the noise follows from that each row's draw adds to its logits."""

    temperature_N: torch.Tensor
    seed_N: torch.Tensor
    output_position_N: torch.Tensor


class DeviceVocabulary(Protocol):
    def whole(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Logits of all ids."""
        ...

    def draw(self, logits_NV: torch.Tensor, noise: Noise, token_N: torch.Tensor) -> None:
        """Draw from the model's own logits into `token_N`."""
        ...


class WholeDeviceVocabulary:
    """Of a rank that is alone; see `DeviceVocabulary`."""

    def whole(self, logits_NV: torch.Tensor) -> torch.Tensor:
        return logits_NV

    def draw(self, logits_NV: torch.Tensor, noise: Noise, token_N: torch.Tensor) -> None:
        sample(logits_NV, *noise, token_N)


class SplitDeviceVocabulary:
    """Of one of several ranks, which hold consecutive ids each; see `DeviceVocabulary`."""

    def __init__(self, part: Part, collectives: Collectives) -> None:
        self._part = part
        self._collectives = collectives

    def whole(self, logits_NV: torch.Tensor) -> torch.Tensor:
        logits_KNV = self._collectives.all_gather(logits_NV)
        return logits_KNV.transpose(0, 1).flatten(1)[:, : self._part.whole]

    def draw(self, logits_NV: torch.Tensor, noise: Noise, token_N: torch.Tensor) -> None:
        """Of equal scores the smallest id wins."""
        part = self._part
        own_NV = logits_NV[:, : part.length]  # without the padding
        candidate_N2 = best(own_NV, *noise, first_id=part.start)
        draw_best(self._collectives.all_gather(candidate_N2), token_N)
