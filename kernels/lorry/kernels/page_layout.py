"""Where an adapter's weights lie in the pages of the GPU pool.

A page holds 16 tokens of KV of all layers; one layer's part of it is a slice. Slice l of an
adapter's pages stores that adapter's layer-l weights as one virtual space: virtual element v of
layer l is in page ``v // slice_elements`` of the adapter, at ``v % slice_elements`` of slice l.

The virtual space holds, in this order and without absent modules: A of q, k, v stacked, B of each
transposed, then A and B of o, A of gate and up stacked, B of each, A and B of down. So every
weight is a number of rows: A has rows of the module's input, transposed B rows of its output.
Offsets are counted in row units: elements that never cross a page.

The store packs and the kernels read by this module; it knows no torch and no numpy.
"""

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

PAGE_TOKENS = 16
LAYOUT_REVISION = 1
MAX_ROW_UNIT = 256
MIN_ROW_UNIT = 64
MAX_RANK = 256
BASE_MODEL = -1  # the slot of rows that use no adapter

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Modules of a group read the same input, so that one pass over their stacked A serves them all.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
QKV, OUTPUT, GATE_UP, DOWN = range(len(GROUPS))
ROW_PARALLEL = frozenset({"o_proj", "down_proj"})


class Dtype(enum.Enum):
    """Element types of the pool; the value is the safetensors name."""

    BF16 = "BF16"
    FP16 = "F16"
    FP32 = "F32"

    @property
    def itemsize(self) -> int:
        return 4 if self is Dtype.FP32 else 2


class TpStrategy(enum.Enum):
    """How LoRA weights are split over tensor-parallel ranks."""

    SLORA = (
        "slora"  # A of column-parallel modules by rank, of row-parallel ones by input, B by output
    )
    REPLICATED = "replicated"  # A of column-parallel and B of row-parallel modules on every rank


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGeometry:
    """Sizes of the base model that decide how its KV cache and its adapters are laid out."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")

    def module_shape(self, module: str) -> tuple[int, int]:
        """Input and output width of a module's base weight."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[module]

    def group_widths(self, group: int) -> list[int]:
        """Output widths of the modules of ``GROUPS[group]``, whose base weights are stacked."""
        return [self.module_shape(module)[1] for module in GROUPS[group]]


class ModuleOffsets(NamedTuple):
    """Where a module's A and transposed B begin in a layer's virtual space, in row units."""

    a: int
    b: int


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """Everything on which the bytes of a page image depend beside the adapter's version."""

    geometry: ModelGeometry
    dtype: Dtype
    page_tokens: int = PAGE_TOKENS
    tp_size: int = 1
    tp_rank: int = 0
    tp_strategy: TpStrategy | None = None  # required where tp_size > 1
    revision: int = LAYOUT_REVISION

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ValueError(f"page_tokens must be positive, got {self.page_tokens}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"tp_rank {self.tp_rank} is not in [0, {self.tp_size})")
        if self.tp_size > 1 and self.tp_strategy is None:
            raise ValueError(f"tp_strategy is required for tp_size {self.tp_size}")
        self._check_heads()

    def _check_heads(self) -> None:
        """Every query head must be on the rank of its KV head, and all ranks of one shape."""
        heads, kv_heads, size = self.geometry.heads, self.geometry.kv_heads, self.tp_size
        if heads != kv_heads and kv_heads % size and size % kv_heads:
            raise ValueError(
                f"tp_size {size} neither divides nor is a multiple of kv_heads {kv_heads}"
            )

    @cached_property
    def local_geometry(self) -> ModelGeometry:
        """Sizes of one rank's part of the model, padding included; the same on every rank."""
        geometry, size = self.geometry, self.tp_size
        return replace(
            geometry,
            heads=math.ceil(geometry.heads / size),
            kv_heads=self.local_kv_heads,
            intermediate=math.ceil(geometry.intermediate / size),
        )

    @cached_property
    def local_kv_heads(self) -> int:
        """KV heads of one rank; replicated where there are fewer heads than ranks."""
        return math.ceil(self.geometry.kv_heads / self.tp_size)

    @cached_property
    def slice_elements(self) -> int:
        return self.page_tokens * 2 * self.local_kv_heads * self.geometry.head_dim

    @property
    def slice_bytes(self) -> int:
        return self.slice_elements * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.geometry.layers * self.slice_bytes

    @cached_property
    def row_unit(self) -> int:
        """Largest power of two up to 256 that divides the slice and every row width.

        Widths with a smaller divisor than 64 are padded to a multiple of 64.
        """
        widths = [width for module in MODULES for width in self._local_shape(module)]
        unit = math.gcd(MAX_ROW_UNIT, self.slice_elements, *widths)
        if unit < MIN_ROW_UNIT:
            unit = MIN_ROW_UNIT
        if self.slice_elements % unit:
            raise ValueError(f"a slice of {self.slice_elements} elements holds no rows of {unit}")
        return unit

    @property
    def slice_units(self) -> int:
        return self.slice_elements // self.row_unit

    def row_widths(self, module: str) -> tuple[int, int]:
        """Elements of a row of A and of a row of transposed B on this rank, padding included."""
        a_width, b_width = self._local_shape(module)
        unit = self.row_unit
        return math.ceil(a_width / unit) * unit, math.ceil(b_width / unit) * unit

    def a_ways(self, module: str) -> int:
        """Over how many ranks the rows of A are dealt out."""
        is_split = self.tp_strategy is TpStrategy.SLORA and module not in ROW_PARALLEL
        return self.tp_size if is_split else 1

    def a_rows(self, module: str, rank: int) -> int:
        """Rows of A on this rank of an adapter of rank `rank`; transposed B always has `rank`."""
        return math.ceil(rank / self.a_ways(module))

    def offsets(self, targets: Iterable[str], rank: int) -> Mapping[str, ModuleOffsets]:
        """Offsets of the modules in `targets`, in the order of the virtual space."""
        return self._walk(targets, rank)[0]

    def pages(self, targets: Iterable[str], rank: int) -> int:
        """Pages of an adapter of rank `rank` on `targets`; at least 1."""
        return max(1, math.ceil(self._walk(targets, rank)[1] / self.slice_units))

    def _local_shape(self, module: str) -> tuple[int, int]:
        inputs, outputs = self.local_geometry.module_shape(module)
        if self.tp_strategy is TpStrategy.SLORA and module in ROW_PARALLEL:
            outputs = math.ceil(outputs / self.tp_size)
        return inputs, outputs

    def _walk(self, targets: Iterable[str], rank: int) -> tuple[dict[str, ModuleOffsets], int]:
        """Offsets of all modules and the row units of a layer."""
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"rank must be in [1, {MAX_RANK}], got {rank}")
        present = set(targets)
        if unknown := present - set(MODULES):
            raise ValueError(f"unknown modules {sorted(unknown)}")
        a_units, b_units, cursor = dict[str, int](), dict[str, int](), 0
        for group in GROUPS:
            members = [module for module in group if module in present]
            for module in members:
                a_units[module] = cursor
                cursor += self.a_rows(module, rank) * self.row_widths(module)[0] // self.row_unit
            for module in members:
                b_units[module] = cursor
                cursor += rank * self.row_widths(module)[1] // self.row_unit
        return {m: ModuleOffsets(a_units[m], b_units[m]) for m in a_units}, cursor
