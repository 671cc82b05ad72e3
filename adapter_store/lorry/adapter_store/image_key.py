"""What a page image is an image of."""

from hashlib import sha256
from typing import NamedTuple

from lorry.kernels.page_layout import PageLayout


class ImageKey(NamedTuple):
    version: bytes
    layout: PageLayout

    @property
    def file_name(self) -> str:
        return f"{self.version.hex()}.{sha256(repr(self.layout).encode()).hexdigest()[:16]}"
