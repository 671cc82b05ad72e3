"""Reads safetensors files from strangers: every size and offset is checked before it is used."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lorry.adapter_store.strict_json import parse_object
from lorry.rpc.errors import AdapterInvalid

MAX_HEADER_BYTES = 4 << 20
LENGTH = struct.Struct("<Q")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int


class SafetensorsFile:
    """The tensors of a file that lies in memory; the arrays are views of it."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self.entries = read_entries(content)

    def tensor(self, name: str) -> NDArray[Any]:
        entry = self.entries[name]
        flat = np.frombuffer(self._content[entry.start : entry.end], DTYPES[entry.dtype])
        return flat.reshape(entry.shape)

    def raw(self, name: str) -> memoryview:
        entry = self.entries[name]
        return self._content[entry.start : entry.end]


def read_entries(content: memoryview) -> dict[str, TensorEntry]:
    """The header's tensors, which fill the rest of the file without gaps; raises AdapterInvalid."""
    if len(content) < LENGTH.size:
        raise AdapterInvalid.of("weights", f"{len(content)} bytes are no safetensors file")
    (header_bytes,) = LENGTH.unpack(content[: LENGTH.size])
    data_start = LENGTH.size + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data_start > len(content):
        raise AdapterInvalid.of(
            "weights",
            f"a header of {header_bytes} bytes is longer than the file or {MAX_HEADER_BYTES}",
        )
    try:
        header = parse_object(bytes(content[LENGTH.size : data_start]))
    except ValueError as error:
        raise AdapterInvalid.of("weights", f"the header {error}") from error
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    _check_cover(entries, data_start, len(content))
    return entries


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in list(DTYPES):
        raise _invalid(name, f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if not _are_sizes(shape) or len(shape) > 8:
        raise _invalid(name, f"shape must be a list of sizes, got {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _invalid(name, f"data_offsets must be two offsets, got {offsets!r}")
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise _invalid(name, f"data_offsets {offsets} do not hold {num_bytes} bytes")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_cover(entries: Mapping[str, TensorEntry], start: int, file_bytes: int) -> None:
    cursor = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != cursor:
            raise _invalid(name, f"begins at byte {entry.start} and not at {cursor}")
        cursor = entry.end
    if cursor != file_bytes:
        raise AdapterInvalid.of("weights", f"tensors end at byte {cursor} of {file_bytes}")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)


def _invalid(name: str, problem: str) -> AdapterInvalid:
    return AdapterInvalid.of(name[:200], problem[:400])
