"""Page images in shared-memory files, mapped while the engine may load them."""

import os
import warnings
from dataclasses import dataclass

import torch

from lorry.rpc import huge_pages
from lorry.worker.messages import ImageReady


@dataclass(slots=True)
class _MappedFile:
    data: torch.Tensor  # uint8, read-only; the mapping lives as long as any view of it
    users: int = 0


class HostImages:
    """Maps each file once, for all the versions that lie in it."""

    def __init__(self) -> None:
        self._files: dict[str, _MappedFile] = {}
        self._images: dict[bytes, ImageReady] = {}

    def map(self, image: ImageReady) -> None:
        """Map the image's file; raises OSError or ValueError if it is not as announced."""
        file = self._files.get(image.path) or _MappedFile(map_file(image.path))
        if image.offset + image.image_bytes > len(file.data):
            raise ValueError(
                f"{image.path} has {len(file.data)} bytes, "
                f"not {image.image_bytes} from {image.offset}"
            )
        self._files[image.path] = file
        self._images[image.version] = image
        file.users += 1

    def bytes_of(self, version: bytes) -> torch.Tensor:
        """The image as uint8; read-only."""
        image = self._images[version]
        data = self._files[image.path].data
        return data[image.offset : image.offset + image.image_bytes]

    def file_of(self, version: bytes) -> torch.Tensor:
        """The whole file in which the image lies, as uint8; read-only."""
        return self._files[self._images[version].path].data

    def unmap(self, version: bytes) -> torch.Tensor | None:
        """Forget an image; returns its file's bytes if no other image lies in them.

        The file is unmapped as soon as the caller drops them.
        """
        path = self._images.pop(version).path
        file = self._files[path]
        file.users -= 1
        if file.users:
            return None
        return self._files.pop(path).data


def map_file(path: str | os.PathLike[str]) -> torch.Tensor:
    """A file's bytes, read-only; the mapping lives as long as any view of them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        content = huge_pages.map_file(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(content, dtype=torch.uint8)
