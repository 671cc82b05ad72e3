"""`lorry generate`: stream the answer to one prompt."""

import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from lorry.client.commands.connection import DEFAULT, Connection
from lorry.client.console import make_console, make_table
from lorry.client.generation import ChatMessage, Completion, Request, TokenLogprobs


async def generate(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    *,
    adapter: str = "",
    model: str = "",
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    min_tokens: int = 0,
    seed: int | None = None,
    stop: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    stop_token_id: Annotated[tuple[int, ...], Parameter(negative="")] = (),
    ignore_eos: Annotated[bool, Parameter(negative="")] = False,
    chat: Annotated[bool, Parameter(negative="")] = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    stats: Annotated[bool, Parameter(negative="")] = False,
    connection: Connection = DEFAULT,
) -> None:
    """Print the answer to a prompt while it is being generated.

    Parameters
    ----------
    prompt
        Text to continue; `-` reads it from standard input.
    adapter
        Id or full name of the adapter; default: the base model alone.
    model
        Name of the base model; default: the one that is served.
    max_tokens
        Most tokens to generate; default: to the end of the model's context.
    temperature
        Randomness, 0 to 10; 0 always takes the most likely token.
    top_p
        Draw from the most likely tokens of this total probability only; default: from all.
    top_k
        Draw from this many most likely tokens only; 0 is all.
    min_p
        Draw from tokens of at least this share of the most likely one's probability only.
    repetition_penalty
        Makes tokens of prompt and answer less likely, above 0 to 10; default: 1, no change.
    presence_penalty
        Makes tokens less likely once they are in the answer, -2 to 2.
    frequency_penalty
        Makes tokens less likely each time that they are in the answer, -2 to 2.
    logit_bias
        ID=BIAS: add -100 to 100 to a token's logit. May be given up to 300 times.
    min_tokens
        Neither a stop token nor a stop string ends the answer before this many tokens.
    seed
        Makes random answers repeatable; default: another one each time.
    stop
        The text ends before this string. May be given up to 16 times.
    stop_token_id
        The answer ends with this token. May be given up to 64 times.
    ignore_eos
        Go on after the model's end-of-sequence tokens.
    chat
        Send the prompt as a user's chat message, through the model's chat template.
    logprobs
        Print the logprob of each token, in nats, and those of this many most likely tokens, 0 to
        20, to standard error at the end; default: none.
    prompt_logprobs
        The same for each token of the prompt but the first.
    slo_ttft_s
        Seconds to the first token that are acceptable; a router that is too busy for it refuses
        at once.
    slo_tpot_s
        Seconds per further token that are acceptable.
    stats
        Print token counts and times to standard error at the end.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    request = Request(
        prompt=[ChatMessage("user", text)] if chat else text,
        adapter=adapter,
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_parse_biases(logit_bias),
        min_tokens=min_tokens,
        seed=seed,
        stop_strings=stop,
        stop_token_ids=stop_token_id,
        ignore_eos=ignore_eos,
        top_logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
    )
    reported: list[TokenLogprobs] = []
    async with connection.client() as client, client.stream(request) as stream:
        async for chunk in stream:
            print(chunk.text, end="", flush=True)
            reported += chunk.logprobs
    print()
    for title, rows in (("prompt", stream.prompt_logprobs), ("token", reported)):
        if rows:
            make_console(stderr=True).print(_logprob_table(title, rows))
    if stats and stream.completion is not None:
        make_console(stderr=True).print(_summary(stream.completion), style="dim")


def _parse_biases(texts: Sequence[str]) -> dict[int, float]:
    biases = {}
    for text in texts:
        token_id, _, bias = text.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError as error:
            raise ValueError(f"logit_bias must be ID=BIAS, got {text!r}") from error
    return biases


def _logprob_table(title: str, reported: Sequence[TokenLogprobs]) -> Table:
    """Tokens are shown by their ids: the client has no tokenizer."""
    table = make_table(title, "logprob", "most likely")
    for token in reported:
        top = ", ".join(f"{token_id} {logprob:.3f}" for token_id, logprob in token.top)
        table.add_row(str(token.token_id), f"{token.logprob:.3f}", top)
    return table


def _summary(completion: Completion) -> str:
    return (
        f"{completion.adapter or 'base model'}: {completion.prompt_tokens} prompt tokens, "
        f"{completion.completion_tokens} tokens, first after {completion.ttft_s * 1e3:.0f} ms "
        f"({completion.queue_s * 1e3:.0f} ms queued, adapter {completion.adapter_load_s * 1e3:.0f} "
        f"ms), ended by {completion.finish_reason.name.lower()}"
    )
