"""The sum of rows over ranks, two of which share one GPU, each with a stream of its own."""

import torch

from lorry.kernels.rank_sum import ROOMS, sum_add_rms_norm, sum_add_rms_norm_reference
from tests.kernels.test_rank_sum import CAPACITY, EPS, Ranks

DEVICE, SIZE, HIDDEN, DTYPE = "cuda", 2, 5120, torch.bfloat16
STEPS = 40


def test_two_ranks_at_once_have_equal_bits_and_the_sum() -> None:
    ranks = Ranks(SIZE, HIDDEN, DTYPE, DEVICE)
    streams = [torch.cuda.Stream() for _ in range(SIZE)]
    rows = [1, 7, 64, 128, 129, CAPACITY]
    weight_H = torch.randn(HIDDEN, device=DEVICE, dtype=DTYPE)
    parts = [
        torch.randn(SIZE, rows[step % len(rows)], HIDDEN, device=DEVICE, dtype=DTYPE)
        for step in range(STEPS)
    ]
    residuals = [torch.randn_like(of_step[0]) for of_step in parts]
    found = [
        [
            (of_step[rank].clone(), left.clone())
            for of_step, left in zip(parts, residuals, strict=True)
        ]
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
