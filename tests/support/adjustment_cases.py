"""Penalties, biases and bans of rows, and what to hold their kernels to."""

import torch

from lorry.kernels.adjustments import Adjustments, SequenceTables, adjust, adjust_reference

NUM_BIASES, NUM_BANNED = 300, 128


def mixed_tables(rows: int, vocabulary: int, device: torch.device) -> SequenceTables:
    """Tables for `rows` sequences; a third of the tokens has come, up to 20 times."""
    generator = torch.Generator().manual_seed(vocabulary)
    count = torch.randint(1, 42, (rows, vocabulary), generator=generator, dtype=torch.int32)
    has_come = torch.rand(rows, vocabulary, generator=generator) < 1 / 3
    ids = torch.stack(
        [torch.randperm(vocabulary, generator=generator)[:NUM_BIASES] for _ in range(rows)]
    ).int()
    banned = torch.randint(vocabulary, (rows, NUM_BANNED), generator=generator, dtype=torch.int32)
    banned[:, ::5] = ids[:, : banned.shape[1] : 5]  # that have a bias, too
    bias = torch.randn(rows, NUM_BIASES, generator=generator) * 10
    bias[:, ::7] = -torch.inf
    return SequenceTables(*(x.to(device) for x in (count * has_come, ids, bias, banned)))


def mixed_adjustments(rows: int, device: torch.device, seed: int = 0) -> Adjustments:
    """Every mix of on and off; the rows of the tables are taken in another order."""
    generator = torch.Generator().manual_seed(seed)

    def choose(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    parts = (
        torch.randperm(rows, generator=generator),
        choose(1, 1, 1.3, 0.6, 10),
        choose(0, 0, 1.5, -2),
        choose(0, 0, 0.3, -0.7),
        choose(0, 0, 1, 17, NUM_BIASES).int(),
        choose(0, 0, 1, 33, NUM_BANNED).int(),
    )
    return Adjustments(*(part.to(device) for part in parts))


def check_adjustments(
    logits_TV: torch.Tensor, tables: SequenceTables, rows: Adjustments
) -> torch.Tensor:
    """Compare the kernels with the reference; returns what they made of the logits."""
    before = logits_TV.clone()
    actual, expected = adjust(logits_TV, tables, rows), adjust_reference(logits_TV, tables, rows)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)
    plain = ~rows.counts_T & (rows.num_biases_T == 0) & (rows.num_banned_T == 0)
    assert torch.equal(actual[plain], logits_TV[plain].float())
    assert torch.equal(logits_TV, before), "raw logits are changed"
    return actual
