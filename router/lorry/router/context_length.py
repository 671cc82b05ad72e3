"""How many tokens a request may have in all, and in one message."""

from lorry.router.generation import Generation
from lorry.rpc.errors import ContextLengthExceeded, InvalidRequest

MAX_ANSWER_BYTES = 2 << 20  # of one message
TOKEN_BYTES = 24  # of a token's id and logprob, and of its text, about
ALTERNATIVE_BYTES = 9  # at most


def resolve_max_tokens(
    generation: Generation, *, num_prompt_tokens: int, max_context_tokens: int
) -> int:
    """The limit of output tokens: what the client asked for, or the rest of the context.

    Raises ContextLengthExceeded if that, or the prompt alone, leaves the context.
    """
    rest = max_context_tokens - num_prompt_tokens
    if rest < 1:
        raise context_exceeded("prompt", num_prompt_tokens, 1, max_context_tokens)
    if generation.max_tokens is not None and generation.max_tokens > rest:
        raise context_exceeded(
            "stopping.max_tokens", num_prompt_tokens, generation.max_tokens, max_context_tokens
        )
    if generation.min_tokens > rest:
        raise context_exceeded(
            "stopping.min_tokens", num_prompt_tokens, generation.min_tokens, max_context_tokens
        )
    return generation.max_tokens or rest


def check_answer_size(generation: Generation, max_tokens: int, num_prompt_tokens: int) -> None:
    """Raises InvalidRequest if the answer's logprobs could be too large for one message."""
    left = MAX_ANSWER_BYTES - num_prompt_tokens * _token_bytes(generation.prompt_logprobs)
    if left < 0:
        raise InvalidRequest.of(
            "response.prompt_logprobs",
            f"the logprobs of {num_prompt_tokens} prompt tokens could exceed one message of "
            f"{MAX_ANSWER_BYTES} bytes; stream them",
        )
    token_bytes = _token_bytes(generation.top_logprobs)
    if max_tokens * token_bytes > left:
        raise InvalidRequest.of(
            "response.top_logprobs",
            f"the logprobs of {max_tokens} tokens could exceed one message of "
            f"{MAX_ANSWER_BYTES} bytes; stream them, or set stopping.max_tokens to at most "
            f"{left // token_bytes}",
        )


def _token_bytes(num_top: int | None) -> int:
    return 0 if num_top is None else TOKEN_BYTES + ALTERNATIVE_BYTES * num_top


def context_exceeded(
    field: str, num_prompt_tokens: int, num_output_tokens: int, max_context_tokens: int
) -> ContextLengthExceeded:
    return ContextLengthExceeded.of(
        field,
        f"{num_prompt_tokens} prompt tokens and {num_output_tokens} output tokens exceed "
        f"the context of {max_context_tokens} tokens",
    )
