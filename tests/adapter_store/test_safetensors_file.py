import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from safetensors.numpy import save

from lorry.adapter_store.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from lorry.rpc.errors import AdapterInvalid

TENSORS: dict[str, NDArray[Any]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5, dtype=np.float16),
    "c": np.arange(4, dtype=bfloat16).reshape(4, 1),
}


def file_of(header: Any, data: bytes = b"") -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(struct.pack("<Q", len(text)) + text + data)


def entry(start: int, end: int, *, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_tensors_are_read_as_they_were_written() -> None:
    file = SafetensorsFile(memoryview(save(TENSORS, {"format": "pt"})))
    assert file.entries.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(file.tensor(name), values)
        assert file.tensor(name).dtype == values.dtype
        assert bytes(file.raw(name)) == values.tobytes()


@pytest.mark.parametrize("cut", range(0, len(save(TENSORS)), 7))
def test_a_file_cut_anywhere_is_refused(cut: int) -> None:
    with pytest.raises(AdapterInvalid):
        SafetensorsFile(memoryview(save(TENSORS)[:cut]))


def test_a_file_with_bytes_after_the_last_tensor_is_refused() -> None:
    with pytest.raises(AdapterInvalid, match="end at byte"):
        SafetensorsFile(memoryview(save(TENSORS) + b"x"))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_a_header_length_is_checked_before_it_is_used(length: int) -> None:
    with pytest.raises(AdapterInvalid):
        SafetensorsFile(memoryview(struct.pack("<Q", length) + b"{}"))


def test_a_header_above_the_limit_is_refused_even_if_it_is_there() -> None:
    with pytest.raises(AdapterInvalid, match="longer than"):
        SafetensorsFile(file_of(b"{" + b" " * MAX_HEADER_BYTES + b"}"))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"[]", b""),
        (b"\xff\xfe", b""),
        (b"{" * 100_000, b""),
        (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', b""),
        ({"a": []}, b""),
        ({"a": entry(0, 4, dtype="F64")}, b"1234"),
        ({"a": entry(0, 4, dtype=["F32"])}, b"1234"),
        ({"a": entry(0, 4, dtype={})}, b"1234"),
        ({"a": entry(0, 4, shape=[-1])}, b"1234"),
        ({"a": entry(0, 4, shape=[1.0])}, b"1234"),
        ({"a": entry(0, 4, shape=[True])}, b"1234"),
        ({"a": entry(0, 4, shape="1")}, b"1234"),
        ({"a": entry(0, 4, shape=[1] * 9)}, b"1234"),
        ({"a": entry(0, 4, shape=[2**40, 2**40])}, b"1234"),
        ({"a": entry(4, 0)}, b"1234"),
        ({"a": entry(0, 8)}, b"12345678"),
        ({"a": entry(0, 2**60, shape=[2**58])}, b"1234"),
        ({"a": entry(4, 8)}, b"12345678"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"123456789012"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
        ({}, b"1234"),
    ],
)
def test_a_malformed_header_is_refused(header: Any, data: bytes) -> None:
    with pytest.raises(AdapterInvalid):
        SafetensorsFile(file_of(header, data))


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(content: bytes) -> None:
    for candidate in (content, struct.pack("<Q", len(content)) + content):
        try:
            SafetensorsFile(memoryview(candidate))
        except AdapterInvalid:
            continue


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {}, optional={"dtype": VALUES, "shape": VALUES, "data_offsets": VALUES}
)


@given(st.dictionaries(st.text(max_size=3), FIELDS | VALUES, max_size=3))
def test_no_header_raises_anything_but_a_refusal(header: dict[str, Any]) -> None:
    try:
        SafetensorsFile(file_of(header))
    except AdapterInvalid:
        return
