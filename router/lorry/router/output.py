"""The tokens of one request on their way to its client.

What arrives while the client is busy with the last message waits here and goes out as one chunk, so
a slow client gets fewer, larger messages. The router bounds how much and how long.
"""

import asyncio

from lorry.router.generation import Chunk, Completion, PromptLogprobs, TokenLogprobs
from lorry.router.text_stream import TextStream
from lorry.rpc.errors import LorryError

MAX_CHUNK_LOGPROBS = 4096  # tokens of a chunk, if each has logprobs; 0.8 MiB with all alternatives


class Output:
    """The router pushes, one client takes: chunks until None, then `completed`.

    With `streaming` false the client gets everything in one chunk at the end.
    """

    __slots__ = (
        "_completion",
        "_ended",
        "_error",
        "_loop",
        "_streaming",
        "_text",
        "_unsent_ids",
        "_unsent_logprobs",
        "_unsent_prompt",
        "_unsent_text",
        "_waiter",
        "has_sent",
        "num_sent",
        "taken_s",
    )

    def __init__(self, text: TextStream, *, streaming: bool) -> None:
        self._text = text
        self._streaming = streaming
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._unsent_ids: list[int] = []
        self._unsent_logprobs: list[TokenLogprobs] = []  # as many, or none
        self._unsent_text = ""
        self._unsent_prompt: list[PromptLogprobs] = []
        self._ended = False
        self._error: LorryError | None = None
        self._completion: Completion | None = None
        self.num_sent = 0  # tokens that the client has taken
        self.has_sent = False  # whether it has taken anything, a token or not
        self.taken_s: float | None = None  # when it took the chunk that is still being sent to it

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._text.matched

    @property
    def num_unsent(self) -> int:
        """Tokens of prompt and output that wait for a client that takes them as they come."""
        if not self._streaming:
            return 0
        num_unsent = len(self._unsent_ids)
        if self._unsent_prompt:  # seldom, and this is asked for each token
            num_unsent += sum(len(part.logprobs) for part in self._unsent_prompt)
        return num_unsent

    @property
    def completed(self) -> Completion:
        """How it ended well; only after the last chunk."""
        assert self._completion is not None, "the output has not ended well"
        return self._completion

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Add a token. After a stop string has matched nothing more may be pushed.

        Logprobs come with all tokens of an output or with none.
        """
        self._unsent_ids.append(token_id)
        if logprobs is not None:
            self._unsent_logprobs.append(logprobs)
        self._unsent_text += self._text.push(token_id)
        if self._waiter is not None and self._streaming:
            self._wake()

    def push_prompt(self, part: PromptLogprobs) -> None:
        """Add logprobs of the prompt's next tokens; they fit into a message as they are."""
        self._unsent_prompt.append(part)
        if self._waiter is not None and self._streaming:
            self._wake()

    def flush(self) -> None:
        """No token follows: let out what was held back. It can still match a stop string."""
        self._unsent_text += self._text.flush()

    def complete(self, completion: Completion) -> None:
        self._completion = completion
        self._end()

    def fail(self, error: LorryError) -> None:
        """End with an error, which the client gets instead of tokens that it has not taken."""
        self._error = error
        self._drop_unsent()
        self._end()

    async def next_chunk(self) -> Chunk | None:
        """Wait for what is new; None after the last chunk. Raises the error that ended it."""
        self.taken_s = None
        while not (self._ended or (self._streaming and self._has_news)):
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error
        if not (self._has_news or self._unsent_text):
            return None
        chunk = self._take()
        self.num_sent += len(chunk.token_ids)
        self.has_sent = True
        self.taken_s = self._loop.time()
        return chunk

    @property
    def _has_news(self) -> bool:
        return bool(self._unsent_ids or self._unsent_prompt)

    def _take(self) -> Chunk:
        """All that is unsent, or the first tokens of what would be too large a message."""
        if self._streaming and self._unsent_prompt:
            return Chunk([], "", prompt=(self._unsent_prompt.pop(0),))
        if self._streaming and len(self._unsent_logprobs) > MAX_CHUNK_LOGPROBS:
            first, rest = slice(MAX_CHUNK_LOGPROBS), slice(MAX_CHUNK_LOGPROBS, None)
            chunk = Chunk(self._unsent_ids[first], "", tuple(self._unsent_logprobs[first]))
            self._unsent_ids = self._unsent_ids[rest]
            self._unsent_logprobs = self._unsent_logprobs[rest]
            return chunk
        logprobs = tuple(self._unsent_logprobs)
        chunk = Chunk(self._unsent_ids, self._unsent_text, logprobs, tuple(self._unsent_prompt))
        self._drop_unsent()
        return chunk

    def _drop_unsent(self) -> None:
        self._unsent_ids, self._unsent_text, self._unsent_logprobs = [], "", []
        self._unsent_prompt = []

    def _end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
