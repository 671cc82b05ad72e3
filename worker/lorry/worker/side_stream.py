"""Work beside the current stream's: in a graph, a branch that is joined again."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class SideStream:
    """Fork, launch on the side and on the current stream, join. On a CPU all is done in order.

    What is launched on the side must not allocate: the caching allocator would give its memory to
    work of the other stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def forked(self) -> AbstractContextManager[None]:
        """Launches in the block go to the side, after what the current stream has been given."""
        return nullcontext() if self._stream is None else self._forked(self._stream)

    def join(self) -> None:
        """The current stream goes on when the side is done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def _forked(self, stream: torch.cuda.Stream) -> Iterator[None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


IN_ORDER = SideStream(torch.device("cpu"))
