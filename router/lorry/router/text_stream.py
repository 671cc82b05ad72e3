"""One output's text: detokenized, up to the first stop string."""

from collections.abc import Collection, Sequence

from lorry.router.detokenizer import Detokenizer, TokenTable
from lorry.router.stop_strings import StopMatcher


class TextStream:
    """`push` each token until `matched` is set; then, or at the end of the tokens, `flush` once."""

    __slots__ = ("_detokenizer", "_matcher", "_min_tokens", "_num_tokens", "_stop_token_ids")

    def __init__(
        self,
        table: TokenTable,
        *,
        stop_strings: Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(table)
        self._matcher = StopMatcher(stop_strings) if stop_strings else None
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self._num_tokens = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return None if self._matcher is None else self._matcher.matched

    def push(self, token_id: int) -> str:
        """The text that can be passed on now. A stop token has none."""
        self._num_tokens += 1
        if token_id in self._stop_token_ids:
            return ""
        text = self._detokenizer.push(token_id)
        if self._matcher is None:
            return text
        return self._matcher.push(text, counts=self._num_tokens >= self._min_tokens)

    def flush(self) -> str:
        """The rest of the text, now that no token follows; it can still match a stop string."""
        if self.matched is not None:
            return ""
        text = self._detokenizer.flush()
        if self._matcher is None:
            return text
        text = self._matcher.push(text)
        return text if self.matched is not None else text + self._matcher.flush()
