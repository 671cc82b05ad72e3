"""`lorry generate`: stream the answer to one prompt."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Group, Parameter
from rich.table import Table

from lorry.client.client import GenerationStream
from lorry.client.commands.connection import DEFAULT, Connection
from lorry.client.console import make_console, make_table
from lorry.client.generation import ChatMessage, Completion, Request, TokenLogprobs
from lorry.rpc.errors import LorryError

SAMPLING = Group.create_ordered("Sampling")
Many = Annotated[tuple[str, ...], Parameter(negative="")]
Flag = Annotated[bool, Parameter(negative="")]


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn, and when the answer ends."""

    max_tokens: int | None = None
    """Most tokens to generate; default: to the end of the model's context."""

    min_tokens: int = 0
    """Neither a stop token nor a stop string ends the answer before this many tokens."""

    temperature: float = 0.0
    """Randomness, 0 to 10; 0 always takes the most likely token."""

    top_p: float | None = None
    """Draw from the most likely tokens of this total probability only; default: from all."""

    top_k: int = 0
    """Draw from this many most likely tokens only; 0 is all."""

    min_p: float = 0.0
    """Draw from tokens of at least this share of the most likely one's probability only."""

    repetition_penalty: float | None = None
    """Makes tokens of prompt and answer less likely, above 0 to 10; default: 1, no change."""

    presence_penalty: float = 0.0
    """Makes tokens less likely once they are in the answer, -2 to 2."""

    frequency_penalty: float = 0.0
    """Makes tokens less likely each time that they are in the answer, -2 to 2."""

    logit_bias: Many = ()
    """ID=BIAS: add -100 to 100 to a token's logit. May be given up to 300 times."""

    seed: int | None = None
    """Makes random answers repeatable; default: another one each time."""

    stop: Many = ()
    """The text ends before this string. May be given up to 16 times."""

    stop_token_id: Annotated[tuple[int, ...], Parameter(negative="")] = ()
    """The answer ends with this token. May be given up to 64 times."""

    ignore_eos: Flag = False
    """Go on after the model's end-of-sequence tokens."""

    def of_request(self) -> dict[str, Any]:
        """The fields of a request; raises ValueError naming a bias that is none."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        fields["logit_bias"] = _parse_biases(self.logit_bias)
        fields["stop_strings"] = fields.pop("stop")
        fields["stop_token_ids"] = fields.pop("stop_token_id")
        return fields


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What is asked for, and what is told of it."""

    adapter: str = ""
    """Id or full name of the adapter; default: the base model alone."""

    model: str = ""
    """Name of the base model; default: the one that is served."""

    chat: Flag = False
    """Send the prompt as a user's chat message, through the model's chat template."""

    logprobs: int | None = None
    """Print the logprob of each token, in nats, and those of this many most likely tokens, 0 to 20,
    to standard error at the end; default: none."""

    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""

    slo_ttft_s: float | None = None
    """Seconds to the first token that are acceptable; a router that is too busy for it refuses at
    once."""

    slo_tpot_s: float | None = None
    """Seconds per further token that are acceptable."""

    stats: Flag = False
    """Print token counts and times to standard error at the end."""

    def request(self, text: str, sampling: SamplingOptions) -> Request:
        return Request(
            prompt=[ChatMessage("user", text)] if self.chat else text,
            adapter=self.adapter,
            model=self.model,
            top_logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            slo_ttft_s=self.slo_ttft_s,
            slo_tpot_s=self.slo_tpot_s,
            **sampling.of_request(),
        )


ANY_ANSWER, ANY_SAMPLING = AnswerOptions(), SamplingOptions()


async def generate(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    *,
    answer: AnswerOptions = ANY_ANSWER,
    sampling: SamplingOptions = ANY_SAMPLING,
    connection: Connection = DEFAULT,
) -> None:
    """Print the answer to a prompt while it is being generated.

    Parameters
    ----------
    prompt
        Text to continue; `-` reads it from standard input.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    request = answer.request(text, sampling)
    async with connection.client() as client, client.stream(request) as stream:
        reported = await _print_all(stream)
    for title, rows in (("prompt", stream.prompt_logprobs), ("token", reported)):
        if rows:
            make_console(stderr=True).print(_logprob_table(title, rows))
    if answer.stats and stream.completion is not None:
        make_console(stderr=True).print(_summary(stream.completion), style="dim")


async def _print_all(stream: GenerationStream) -> list[TokenLogprobs]:
    """Print the text as it comes and return its logprobs; what follows begins a line."""
    reported, last = list[TokenLogprobs](), ""
    try:
        async for chunk in stream:
            print(chunk.text, end="", flush=True)
            reported += chunk.logprobs
            last = chunk.text[-1:] or last
    except LorryError:
        if last not in ("", "\n"):
            print(flush=True)
        raise
    print()
    return reported


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
