"""What the worker's front tells its engine process: requests, page images, and what operators ask.

A request is known by a number that the front chooses and never reuses.
"""

from collections.abc import Iterator

import msgspec


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages."""


class Failure(Message, frozen=True):
    """An error of lorry.rpc.errors by its reason; the front makes the status."""

    reason: str
    message: str
    metadata: dict[str, str] = {}


class Submit(Message, frozen=True):
    """One request; every one ends in exactly one Finished."""

    request: int
    tenant: str
    version: bytes  # empty: the base model
    token_ids: list[int]  # the prompt, then what was already output
    generated_tokens: int  # how many of token_ids were already output
    max_tokens: int  # of output, generated_tokens included
    min_tokens: int
    stop_token_ids: list[int]
    temperature: float
    seed: int  # unsigned 64 bits
    remaining_s: float | None  # of the deadline
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_logprobs: int | None = None  # the same as top_logprobs, of the prompt's tokens
    logit_bias: dict[int, float] = {}  # by token id
    top_logprobs: int | None = None  # alternatives of each token; None: no logprobs at all


class Cancel(Message, frozen=True):
    requests: list[int]


class Prefetch(Message, frozen=True):
    """The versions wanted next, most urgent first; replaces the last set."""

    versions: list[bytes]


class ImageModule(Message, frozen=True):
    name: str
    row_offset: int
    b_row_offset: int
    scale_per_layer: list[float]


class ImageFile(Message, frozen=True):
    """Where one tensor-parallel rank's page image begins; it is as long as the first rank's."""

    path: str
    offset: int


class ImageReady(Message, frozen=True):
    """A version's page image is in a shared-memory file that the engine may map."""

    version: bytes
    path: str
    offset: int
    image_bytes: int
    pages: int
    rank: int
    modules: list[ImageModule]
    copied: bool = False  # it came in chunks, to a file of this worker's own
    other_ranks: list[ImageFile] = []  # the second tensor-parallel rank's image, and so on

    def of_other_ranks(self) -> Iterator["ImageReady"]:
        """What each of them maps: images are described alike on all ranks."""
        for file in self.other_ranks:
            yield msgspec.structs.replace(self, path=file.path, offset=file.offset, other_ranks=[])


class ImageFailed(Message, frozen=True):
    version: bytes
    failure: Failure


class ReclaimImage(Message, frozen=True):
    """The store needs the image's memory: unmap as soon as no copy runs, then ReleaseImage."""

    version: bytes


class PinAdapter(Message, frozen=True):
    """Load a version if need be and keep it; answered by an AdminResult once it is resident."""

    call: int
    version: bytes


class UnpinAdapter(Message, frozen=True):
    call: int
    version: bytes


class EvictAdapter(Message, frozen=True):
    call: int
    version: bytes


class Stop(Message, frozen=True):
    """End the engine process."""


Command = (
    Submit
    | Cancel
    | Prefetch
    | ImageReady
    | ImageFailed
    | ReclaimImage
    | PinAdapter
    | UnpinAdapter
    | EvictAdapter
    | Stop
)
