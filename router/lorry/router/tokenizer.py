"""The base model's tokenizer, run in a few threads so that it never holds up the event loop."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer as Backend

from lorry.router.chat_template import ChatTemplate
from lorry.router.detokenizer import TokenTable, UnsupportedTokenizer
from lorry.router.generation import Chat, Prompt, largest_num_tokens
from lorry.rpc.errors import InvalidRequest

LONG_PROMPT_BYTES = 64 << 10


class Tokenizer:
    """Owns its threads; `close` ends them.

    Long prompts, which take up to a second, wait for one thread of their own: however many there
    are, they do not hold up the short ones.
    """

    def __init__(
        self, backend: Backend, chat_template: ChatTemplate | None, *, num_threads: int
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.table = TokenTable.of_tokenizer(backend)
        self._backend = backend
        self._chat_template = chat_template
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._long_thread = ThreadPoolExecutor(1, thread_name_prefix="long-tokenizer")

    @classmethod
    def read(cls, directory: Path, *, num_threads: int) -> "Tokenizer":
        """Raises UnsupportedTokenizer if the directory has no tokenizer that can be served."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise UnsupportedTokenizer(f"{directory} holds no tokenizer.json")
        backend = Backend.from_file(str(path))
        return cls(backend, ChatTemplate.read(directory), num_threads=num_threads)

    async def encode(self, prompt: Prompt) -> Sequence[int]:
        """The prompt's token ids; InvalidRequest if it has none or needs a missing template."""
        if not isinstance(prompt, str | Chat):
            return prompt
        is_long = largest_num_tokens(prompt) > LONG_PROMPT_BYTES
        threads = self._long_thread if is_long else self._threads
        ids = await asyncio.get_running_loop().run_in_executor(threads, self._encode, prompt)
        if not ids:
            raise InvalidRequest.of("prompt", "it has no tokens")
        return ids

    def close(self) -> None:
        for threads in (self._threads, self._long_thread):
            threads.shutdown(cancel_futures=True)

    def _encode(self, prompt: str | Chat) -> Sequence[int]:
        if isinstance(prompt, str):
            return self._token_ids(prompt, add_special_tokens=True)
        if self._chat_template is None:
            raise InvalidRequest.of("chat", "the base model has no chat template; send a prompt")
        text = self._chat_template.render(prompt)
        return self._token_ids(text, add_special_tokens=False)

    def _token_ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Only the batch methods let go of Python's lock; `encode` would stop the event loop.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)
