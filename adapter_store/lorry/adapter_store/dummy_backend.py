"""The ``dummy:`` backend: random adapters, to load a deployment with before there are real ones.

They are made when they are asked for and kept nowhere: nothing can be added, changed or deleted.
The same adapter has the same weights and version in every life and every store.
"""

import hashlib
import json
import struct
import tempfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn
from urllib.parse import SplitResult, parse_qs

import ml_dtypes
import numpy as np
from crc32c import crc32c

from lorry.adapter_store.backend import Loaded, Position, StoredUpload, UnderWay
from lorry.adapter_store.lora import LoraSpec, ModuleLora, tensor_names, tensor_shapes
from lorry.adapter_store.records import Adapter, Change, Content, UploadRecord, Version
from lorry.kernels.page_layout import MAX_RANK, MODULES, ModelGeometry
from lorry.rpc.errors import FeatureUnsupported, VersionNotFound
from lorry.rpc.names import AdapterName

TENANT = "default"
MAX_ADAPTERS = 1_000_000
SCALE = 2.0  # alpha / r
WEIGHT_DEVIATION = 0.02
BF16_BYTES = 2
HEADER_ALIGNMENT = 8
BLOCK_WEIGHTS = 1 << 24
STRIDE_WEIGHTS = 1021  # between two adapters' starts in the block; prime, so that all differ


@dataclass(frozen=True, slots=True, kw_only=True)
class DummyAdapters:
    """What ``dummy:COUNT?ranks=8,16&modules=q_proj,v_proj`` says: tenant default's adapters dummy-0
    to dummy-(COUNT-1), of these ranks in turns."""

    count: int
    ranks: tuple[int, ...] = (16,)
    modules: tuple[str, ...] = tuple(MODULES)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_ADAPTERS:
            raise ValueError(f"dummy: must have 1 to {MAX_ADAPTERS} adapters, got {self.count}")
        if not all(1 <= rank <= MAX_RANK for rank in self.ranks):
            raise ValueError(f"dummy: ranks must be in [1, {MAX_RANK}], got {self.ranks}")
        if not set(self.modules) <= set(MODULES):
            raise ValueError(f"dummy: modules must be of {', '.join(MODULES)}, got {self.modules}")

    @classmethod
    def parse(cls, url: SplitResult) -> "DummyAdapters":
        """Raises ValueError naming what is wrong."""
        query = parse_qs(url.query, keep_blank_values=True)
        fields = {name: tuple(values[-1].split(",")) for name, values in query.items()}
        if unknown := fields.keys() - {"ranks", "modules"}:
            raise ValueError(f"dummy: has ranks and modules, not {', '.join(sorted(unknown))}")
        ranks = fields.get("ranks", ("16",))
        if not all(rank.isdecimal() for rank in ranks):
            raise ValueError(f"dummy: ranks must be whole numbers, got {','.join(ranks)!r}")
        return cls(
            count=int(url.path),
            ranks=tuple(map(int, ranks)),
            modules=fields.get("modules", tuple(MODULES)),
        )


@dataclass(frozen=True, slots=True)
class Kind:
    """What all adapters of one rank have in common."""

    spec: LoraSpec
    header: bytes  # what the safetensors file begins with
    weights_bytes: int  # of all tensors

    @classmethod
    def of(cls, rank: int, modules: Collection[str], geometry: ModelGeometry) -> "Kind":
        one = ModuleLora((rank,) * geometry.layers, (SCALE,) * geometry.layers)
        spec = LoraSpec({module: one for module in MODULES if module in modules})
        entries, end = {}, 0
        for layer, module, _ in spec.parts():
            shapes = tensor_shapes(geometry, module, rank)
            for name, shape in zip(tensor_names(layer, module), shapes, strict=True):
                start, end = end, end + prod(shape) * BF16_BYTES
                entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        return cls(spec, struct.pack("<Q", len(text)) + text, end)


class DummyBackend:
    """Implements `Backend`."""

    shared = False

    def __init__(
        self,
        adapters: DummyAdapters,
        geometry: ModelGeometry,
        *,
        model_digest: bytes,
        scratch_dir: Path | None,
    ) -> None:
        self.model_digest = model_digest
        self._kinds = [Kind.of(rank, adapters.modules, geometry) for rank in adapters.ranks]
        self._scratch_dir = scratch_dir
        self._numbers = {self._digest(n): n for n in range(adapters.count)}
        self._block = _random_block()

    def load(self) -> Loaded:
        adapters = [self._adapter(number, digest) for digest, number in self._numbers.items()]
        return Loaded("dummy", Position(0), adapters, [], [])

    def commit(self, name: AdapterName, before: Adapter | None, after: Adapter | None) -> Change:
        raise _read_only()

    def changes(self, after: Position) -> list[Change]:
        """None: nothing changes."""
        return []

    wait_for_changes = changes

    def uploads_of(self, tenant: str) -> UnderWay:
        return UnderWay([], 0)

    def create_upload(self, upload: UploadRecord, *, num_begun: int) -> None:
        raise _read_only()

    def find_upload(self, key: str) -> StoredUpload | None:
        return None

    def append(self, key: str, offset: int, data: bytes | memoryview) -> None:
        raise _read_only()

    def staged(self, key: str) -> AbstractContextManager[Path]:
        raise _read_only()

    def keep(self, key: str, digest: bytes, content: Content) -> None:
        raise _read_only()

    def drop_upload(self, key: str) -> None:
        """Nothing to do: there are no uploads."""

    def drop_expired(self, idle_s: float, *, busy: Collection[str]) -> list[str]:
        return []

    @contextmanager
    def weights(self, digest: bytes) -> Iterator[tuple[Content, Path]]:
        """Made anew, in a file of the scratch directory."""
        number = self._numbers.get(digest)
        if number is None:
            raise VersionNotFound(f"no version {digest.hex()}", version=digest.hex())
        kind = self._kind(number)
        with tempfile.NamedTemporaryFile(dir=self._scratch_dir, prefix="lorry-dummy-") as file:
            checksum = crc32c(kind.header)
            file.write(kind.header)
            for part in self._parts(number, kind.weights_bytes):
                checksum = crc32c(part, checksum)
                file.write(part)
            file.flush()
            yield Content(kind.spec, checksum), Path(file.name)

    def lease(self, digests: Collection[bytes]) -> None:
        """Nothing to do: contents are kept nowhere."""

    def unreferenced(self) -> list[bytes]:
        return []

    def drop(self, digest: bytes) -> None:
        """Nothing to do: contents are kept nowhere."""

    def quarantine(self, digest: bytes) -> None:
        """Nothing to do: the next one is made anew."""

    def problems(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing to do: files go with the blocks that use them."""

    def _kind(self, number: int) -> Kind:
        return self._kinds[number % len(self._kinds)]

    def _digest(self, number: int) -> bytes:
        kind = hashlib.sha256(self._kind(number).header)
        return hashlib.sha256(f"dummy {number} {kind.hexdigest()}".encode()).digest()

    def _adapter(self, number: int, digest: bytes) -> Adapter:
        kind = self._kind(number)
        version = Version(
            digest=digest,
            max_rank=kind.spec.max_rank,
            modules=tuple(kind.spec.modules),
            weights_bytes=kind.weights_bytes,
            file_bytes=len(kind.header) + kind.weights_bytes,
            upload=f"dummy-{number}",
            create_time_ns=0,
        )
        return Adapter(
            name=AdapterName(TENANT, f"dummy-{number}"),
            published=digest,
            versions=(version,),
            create_time_ns=0,
            update_time_ns=0,
            etag="dummy",
        )

    def _parts(self, number: int, num_bytes: int) -> Iterator[memoryview]:
        """Of the block, around and around from the adapter's own start."""
        start = number * STRIDE_WEIGHTS % BLOCK_WEIGHTS * BF16_BYTES
        while num_bytes:
            part = self._block[start : start + num_bytes]
            yield part
            start, num_bytes = 0, num_bytes - len(part)


def _read_only() -> NoReturn:
    raise FeatureUnsupported("the adapters of a dummy: backend cannot be changed")


def _random_block() -> memoryview:
    random = np.random.default_rng(0)
    weights = random.standard_normal(BLOCK_WEIGHTS, np.float32) * np.float32(WEIGHT_DEVIATION)
    return memoryview(weights.astype(ml_dtypes.bfloat16).tobytes())
