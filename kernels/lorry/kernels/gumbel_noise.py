"""The noise of draws, which follows from a request's seed alone.

That of a vocabulary id is Philox 4x32-10 (Salmon et al., SC 2011) keyed by the request's seed with
the output position and the id as its counter.

Shape suffixes: T = rows that sample, V = vocabulary.
"""

import torch

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def gumbel_noise(
    seed_T: torch.Tensor, output_position_T: torch.Tensor, vocabulary: int, *, first_id: int = 0
) -> torch.Tensor:
    """Gumbel(0, 1) noise in float32 of `vocabulary` ids from `first_id` on, ``[T, V]``."""
    bits_TV = philox_word(seed_T, output_position_T, vocabulary, first_id=first_id)
    # 23 bits and the half are exact in float32, so that 0 and 1 never come out.
    uniform_TV = ((bits_TV >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform_TV))


def philox_word(
    seed_T: torch.Tensor, output_position_T: torch.Tensor, vocabulary: int, *, first_id: int = 0
) -> torch.Tensor:
    """First output word of Philox with counter (id, position, 0, 0): 32 bits in an int64."""
    ids = torch.arange(first_id, first_id + vocabulary, device=seed_T.device)
    c0 = ids.expand(seed_T.shape[0], -1)
    c1 = output_position_T.long()[:, None].expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = (seed_T & WORD)[:, None], (seed_T >> 32 & WORD)[:, None]
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + PHILOX_WEYL[0] & WORD, k1 + PHILOX_WEYL[1] & WORD
    return c0


def _multiply(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32-bit product; int64 would overflow without the halves."""
    low_part = (x & 0xFFFF) * factor
    high_part = (x >> 16) * factor + (low_part >> 16)
    return high_part >> 16, (high_part << 16 | low_part & 0xFFFF) & WORD
