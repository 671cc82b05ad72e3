"""How many tokens a request may have in all."""

from lorry.router.generation import Generation
from lorry.rpc.errors import ContextLengthExceeded


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


def context_exceeded(
    field: str, num_prompt_tokens: int, num_output_tokens: int, max_context_tokens: int
) -> ContextLengthExceeded:
    return ContextLengthExceeded.of(
        field,
        f"{num_prompt_tokens} prompt tokens and {num_output_tokens} output tokens exceed "
        f"the context of {max_context_tokens} tokens",
    )
