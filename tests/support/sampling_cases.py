"""Rows of logits and sampling parameters, and what to hold kernels to on them."""

from typing import NamedTuple

import torch

from lorry.kernels.logprobs import (
    MAX_TOP,
    NOT_ASKED,
    Logprobs,
    logprobs_reference,
    packed_logprobs,
    rank,
    unpacked,
    write_logprobs,
)
from lorry.kernels.sampling import sample
from lorry.kernels.truncation import truncate, truncation_reference

BORDER = 1e-5  # share of the probability within which rounding decides


class Truncation(NamedTuple):
    """Parameters of rows."""

    temperature_T: torch.Tensor
    top_k_T: torch.Tensor
    top_p_T: torch.Tensor
    min_p_T: torch.Tensor


def mixed_truncation(rows: int, device: torch.device, seed: int = 0) -> Truncation:
    """Every mix of on and off; each fifth row is greedy."""
    generator = torch.Generator().manual_seed(seed)

    def choose(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    temperature = choose(0.3, 0.7, 1.0, 1.5)
    temperature[::5] = 0
    return Truncation(
        temperature.to(device),
        choose(0, 0, 1, 2, 50, 1000, 9000).int().to(device),
        choose(1, 1, 0.9, 0.5, 0.99, 1e-6, 1 - 1e-4).to(device),
        choose(0, 0, 0.05, 0.5, 1).to(device),
    )


def mixed_logits(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Peaked and flat rows, as columns of a wider tensor; some tokens cannot be drawn."""
    generator = torch.Generator(device).manual_seed(rows * vocabulary)
    wide = torch.randn(rows, vocabulary + 48, device=device, generator=generator)
    wide *= torch.linspace(0.05, 6, rows, device=device)[:, None]
    wide[:, 32] = -torch.inf
    return wide.to(dtype)[:, 32 : vocabulary + 32]


def check_truncation(logits_TV: torch.Tensor, rows: Truncation) -> torch.Tensor:
    """Compare the kernel's kept tokens with the reference's; returns the thresholds."""
    actual, expected = truncate(logits_TV, *rows), truncation_reference(logits_TV, *rows)
    logits_TV = logits_TV.float()
    differs_TV = (logits_TV >= actual[:, None]) != (logits_TV >= expected[:, None])
    for row in differs_TV.any(dim=1).nonzero()[:, 0].tolist():
        parameters = Truncation(*(values[row] for values in rows))
        _check_border(logits_TV[row], differs_TV[row], parameters)
    return actual


def _check_border(logits_V: torch.Tensor, differs_V: torch.Tensor, row: Truncation) -> None:
    """The disputed tokens lie where the probability above them is top_p, or they have min_p."""
    temperature, top_k, top_p, min_p = (value.item() for value in row)
    weight_V = ((logits_V - logits_V.max()).double() / temperature).exp()
    if top_k:
        kth = logits_V.topk(min(int(top_k), len(logits_V))).values[-1]
        weight_V = weight_V.where(logits_V >= kth, 0)
    for logit in logits_V[differs_V].unique():
        above = float(weight_V[logits_V > logit].sum() / weight_V.sum())
        share = float(weight_V[logits_V == logit][0])
        message = f"{above} above a logit of {share}, for {row}"
        assert abs(above - top_p) < BORDER or abs(share - min_p) < BORDER, message


def report_logprobs(
    logits_TV: torch.Tensor, token_T: torch.Tensor, num_top_T: torch.Tensor
) -> Logprobs:
    """The kernels' logprobs of rows that may be changed before the tokens are known."""
    out = unpacked(packed_logprobs(len(logits_TV), logits_TV.device))
    ranked = rank(logits_TV, num_top_T)
    write_logprobs(logits_TV, ranked, token_T, num_top_T, out)
    return out


def check_logprobs(
    logits_TV: torch.Tensor, token_T: torch.Tensor, num_top_T: torch.Tensor
) -> Logprobs:
    actual = report_logprobs(logits_TV, token_T, num_top_T)
    expected = logprobs_reference(logits_TV, token_T, num_top_T)
    asked = num_top_T >= 0
    places = torch.arange(MAX_TOP, device=num_top_T.device) < num_top_T[:, None]
    torch.testing.assert_close(
        actual.chosen_T[asked], expected.chosen_T[asked], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(actual.top_id_TX[places], expected.top_id_TX[places])
    torch.testing.assert_close(
        actual.top_logprob_TX[places], expected.top_logprob_TX[places], rtol=1e-5, atol=1e-5
    )
    return actual


def mixed_num_top(rows: int, device: torch.device) -> torch.Tensor:
    """Rows that ask for nothing, for the chosen token only, and for alternatives."""
    choices = torch.tensor([NOT_ASKED, 0, 1, 5, MAX_TOP], dtype=torch.int32, device=device)
    return choices[torch.arange(rows, device=device) % len(choices)]


def check_rows_of_nans(device: torch.device) -> None:
    """Rows that an adapter made NaN in part or as a whole, beside others, drawn in every way."""
    rows, vocabulary = 12, 5003
    logits = mixed_logits(rows, vocabulary, torch.bfloat16, device).contiguous()
    clean = logits.clone()
    logits[::3] = torch.nan
    logits[1::3, 1:-1] = torch.nan
    parameters = mixed_truncation(rows, device)
    number = torch.arange(rows, device=device)
    drawn = []
    for values in (logits, clean):
        token = torch.full((rows,), -1, dtype=torch.int64, device=device)
        ranked = rank(values, number.int())
        threshold = truncate(values, *parameters)
        sample(values, parameters.temperature_T, number, number.int(), token, threshold)
        out = unpacked(packed_logprobs(rows, device))
        write_logprobs(values, ranked, token, number.int(), out)
        drawn.append(token)
        is_asked = torch.arange(MAX_TOP, device=device) < number[:, None]
        top_id = out.top_id_TX[is_asked]
        assert ((top_id >= 0) & (top_id < vocabulary)).all()
    assert ((drawn[0] >= 0) & (drawn[0] < vocabulary)).all()
    assert torch.isin(drawn[0][1::3].cpu(), torch.tensor([0, vocabulary - 1])).all()
    assert torch.equal(drawn[0][2::3], drawn[1][2::3])
