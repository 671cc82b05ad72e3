"""The sum of rows over ranks, two of which share one GPU, each with a stream of its own."""

import torch

from lorry.kernels.rank_sum import ROOMS, sum_add_rms_norm, sum_add_rms_norm_reference
from tests.kernels.test_rank_sum import CAPACITY, EPS, Ranks

DEVICE, SIZE, HIDDEN, DTYPE = "cuda", 2, 5120, torch.bfloat16
ROWS = [1, 7, 64, 128, 129, CAPACITY]
STEPS = 40


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def load_kernels() -> None:
    """Loading one waits for what runs on the GPU, and a rank that waits for another one runs."""
    ranks = Ranks(SIZE, HIDDEN, DTYPE, DEVICE)
    for rows in ROWS:
        for rank, rooms in enumerate(ranks.rooms):
            ranks.let_others_come(rank, 0, random(SIZE, rows, HIDDEN))
            sum_add_rms_norm(
                random(rows, HIDDEN), rooms, 0, random(rows, HIDDEN), random(HIDDEN), EPS
            )
            torch.cuda.synchronize()


def test_two_ranks_at_once_have_equal_bits_and_the_sum() -> None:
    load_kernels()
    ranks = Ranks(SIZE, HIDDEN, DTYPE, DEVICE)
    streams = [torch.cuda.Stream() for _ in range(SIZE)]
    weight_H = random(HIDDEN)
    parts = [random(SIZE, ROWS[step % len(ROWS)], HIDDEN) for step in range(STEPS)]
    residuals = [torch.randn_like(of_step[0]) for of_step in parts]
    found = [
        [(part[rank].clone(), left.clone()) for part, left in zip(parts, residuals, strict=True)]
        for rank in range(SIZE)
    ]
    torch.cuda.synchronize()
    for step in range(STEPS):
        for rank, stream in enumerate(streams):
            x_TH, residual_TH = found[rank][step]
            with torch.cuda.stream(stream):
                room = step % ROOMS
                sum_add_rms_norm(x_TH, ranks.rooms[rank], room, residual_TH, weight_H, EPS)
    torch.cuda.synchronize()
    for step in range(STEPS):
        normed_TH, total_TH = sum_add_rms_norm_reference(
            parts[step], residuals[step], weight_H, EPS
        )
        for x_TH, residual_TH in (found[rank][step] for rank in range(SIZE)):
            assert torch.equal(residual_TH, total_TH), step
            assert torch.equal(x_TH, found[0][step][0]), step
            torch.testing.assert_close(x_TH, normed_TH, rtol=2e-2, atol=2e-2)
