"""Adapters that a stranger may send: safetensors files and configs, a little or entirely wrong."""

import json
import struct
from typing import Any

from hypothesis import strategies as st

from lorry.adapter_store.peft_config import ALLOWED, IGNORED, UNDERSTOOD, parse_config, resolve
from lorry.adapter_store.safetensors_file import SafetensorsFile, read_entries
from lorry.kernels.page_layout import MODULES
from lorry.rpc.errors import AdapterInvalid
from tests.support.adapters import TINY, lora_config, lora_files, lora_tensors

CONFIG = lora_config(r=2, targets=("q_proj",))
FILE = lora_files(CONFIG, lora_tensors(CONFIG))[1]
(HEADER_BYTES,) = struct.unpack("<Q", FILE[:8])
HEADER: dict[str, Any] = json.loads(FILE[8 : 8 + HEADER_BYTES])
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 8, 255, 256, 257, 2**31, 2**48, 2**63, 2**64, 10**400]),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
)
TEXTS = st.one_of(
    st.sampled_from([*MODULES, *HEADER, "BF16", "F32", "I64", "__metadata__", "all-linear", "\0"]),
    st.text(max_size=12),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
PATTERNS = st.one_of(
    st.sampled_from(
        ["(", "[", "*", "q_proj", r".*\.q_proj", "(?P<idx>x)", "(?i)Q", r"\1", "a{9999}"]
    ),
    st.text(alphabet="qv_proj.*0[]^$|?", max_size=8),
)
FIELDS = sorted({*UNDERSTOOD, *IGNORED, *ALLOWED, "use_dora", "modules_to_save"})


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A good header of which some entries are replaced, or any JSON."""
    if draw(st.booleans()):
        return json_bytes(draw(TREES))
    header = {name: dict(entry) for name, entry in HEADER.items()}
    for name in draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        header[name][field] = draw(st.one_of(TREES, st.lists(NUMBERS, max_size=3)))
    return json_bytes(header)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file with another header, another length of it, or other bytes."""
    kind = draw(st.sampled_from(["header", "length", "bytes", "cut", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "cut":
        return FILE[: draw(st.integers(0, len(FILE)))]
    if kind == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + FILE[8:]
    if kind == "bytes":
        damaged = bytearray(FILE)
        for place in draw(st.lists(st.integers(0, 8 + HEADER_BYTES), min_size=1, max_size=8)):
            damaged[place] = draw(st.integers(0, 255))
        return bytes(damaged)
    header = draw(headers())
    return struct.pack("<Q", len(header)) + header + FILE[8 + HEADER_BYTES :]


@st.composite
def configs(draw: st.DrawFn) -> str:
    """A good config of which some fields are replaced, or any text."""
    if not draw(st.integers(0, 9)):
        return draw(st.one_of(st.text(max_size=100), TREES.map(json.dumps)))
    config = dict(CONFIG)
    for field in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4)):
        values = st.dictionaries(PATTERNS, LEAVES, max_size=3)
        config[field] = draw(st.one_of(TREES, PATTERNS, st.lists(PATTERNS, max_size=3), values))
    return json.dumps(config)


def check_file(content: bytes) -> bool:
    """Whether a file is good; what is not is AdapterInvalid and nothing else."""
    try:
        entries = read_entries(memoryview(content))
    except AdapterInvalid:
        return False
    file = SafetensorsFile(memoryview(content))
    assert sum(len(file.raw(name)) for name in entries) <= len(content)
    assert all(file.tensor(name).nbytes == len(file.raw(name)) for name in entries)
    return True


def check_config(text: str) -> bool:
    """Whether a config is good; what is not is AdapterInvalid and nothing else."""
    try:
        spec = resolve(parse_config(text), TINY)
    except AdapterInvalid:
        return False
    assert 1 <= spec.max_rank <= 256
    return True
