"""Work beside the current stream's: in a graph, a branch that is joined again."""

from contextlib import AbstractContextManager, nullcontext

import torch


class SideStream:
    """Fork, launch on the current stream and on the side, join. On a CPU all is done in order.

    What is launched on the side must not allocate: the caching allocator would give its memory to
    work of the other stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fork(self) -> None:
        """The side goes on after what the current stream has been given."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def launches(self) -> AbstractContextManager[object]:
        """Launches in the block go to the side."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def join(self) -> None:
        """The current stream goes on when the side is done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


IN_ORDER = SideStream(torch.device("cpu"))
