"""What a store remembers of its memory from one life to the next, in one small JSON file."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorry.adapter_store.durable import write_durably
from lorry.adapter_store.image_key import ImageKey
from lorry.adapter_store.layout_json import layout_from_json, layout_to_json
from lorry.kernels.page_layout import ModelGeometry
from lorry.rpc.errors import StoreUnavailable
from lorry.rpc.names import AdapterName

NAME = "memory.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    pins: tuple[AdapterName, ...] = ()
    wanted: Mapping[ImageKey, float] = field(default_factory=dict)  # the most wanted first


class MemoryFile:
    """Reads and writes the file; without a directory nothing is remembered."""

    def __init__(self, directory: Path | None, geometry: ModelGeometry) -> None:
        self._path = None if directory is None else directory / NAME
        self._geometry = geometry

    def read(self) -> Memory:
        """Empty if there is none. A damaged one costs time, not adapters, so it is only logged."""
        if self._path is None:
            log.warning("there is no --memory-dir: after a restart pins are gone, no image is warm")
            return Memory()
        if not self._path.exists():
            return Memory()
        try:
            return self._memory(json.loads(self._path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not used, pins are lost: %r", self._path, error)
            return Memory()

    def write(self, memory: Memory) -> None:
        """Replace the file; raises StoreUnavailable."""
        if self._path is None:
            return
        layouts = list({key.layout: None for key in memory.wanted})
        places = {layout: place for place, layout in enumerate(layouts)}
        content = {
            "pins": [list(name) for name in memory.pins],
            "layouts": [layout_to_json(layout) for layout in layouts],
            "wanted": [
                [key.version.hex(), places[key.layout], count]
                for key, count in memory.wanted.items()
            ],
        }
        try:
            write_durably(self._path, json.dumps(content).encode())
        except OSError as error:
            raise StoreUnavailable(f"{self._path} cannot be written: {error.strerror}") from error

    def _memory(self, content: Mapping[str, Any]) -> Memory:
        layouts = [layout_from_json(fields, self._geometry) for fields in content["layouts"]]
        return Memory(
            pins=tuple(AdapterName(*name) for name in content["pins"]),
            wanted={
                ImageKey(bytes.fromhex(version), layouts[place]): float(count)
                for version, place, count in content["wanted"]
            },
        )
