"""Matrix products by an algorithm of cuBLAS that the caller picks.

For a product of some shape cuBLAS has several algorithms, in the order of its own estimate. torch
takes the first; measured between the other products of a model, another one is often faster.

Shape suffixes: T = rows of the step, I = input width, O = output width.
"""

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WORKSPACE_BYTES = 32 << 20  # what cuBLAS advises for Hopper
MOST_ALGORITHMS = 8  # of one shape

# Of cublasLt.h and library_types.h.
CUDA_R_32F, CUDA_R_16BF = 0, 14
COMPUTE_32F = 68
TRANSPOSE_A, TRANSPOSED = 3, 1
MAX_WORKSPACE_BYTES = 1

Shape = tuple[int, int, int]  # rows, outputs, inputs


class CublasError(RuntimeError):
    """A call of cuBLAS failed."""


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@dataclass(frozen=True, slots=True)
class _Problem:
    """What cuBLAS knows a shape by. It counts by columns: the weight comes first, transposed."""

    description: ctypes.c_void_p
    weight: ctypes.c_void_p
    x: ctypes.c_void_p
    out: ctypes.c_void_p
    algorithms: list[_Algorithm]


class CublasLt:
    """Products of contiguous bf16 tensors of one GPU, one after the other.

    Sums are in float32; an algorithm that splits them may round its parts to bf16, as torch's may.
    """

    def __init__(self, device: torch.device) -> None:
        assert torch.version.cuda is not None, "torch was built without CUDA"
        # torch has loaded it, wherever it lies.
        self._library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
        self._library.cublasLtGetVersion.restype = ctypes.c_size_t
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._problems = dict[Shape, _Problem]()
        self._created = list[tuple[str, ctypes.c_void_p]]()
        weakref.finalize(self, _destroy, self._library, self._created)

    @property
    def version(self) -> int:
        return int(self._library.cublasLtGetVersion())

    def count(self, shape: Shape) -> int:
        """Algorithms that there are for a shape."""
        return len(self._problem(shape).algorithms)

    def product(
        self,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        algorithm: int,
        onto_TO: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x weight^T`` by an algorithm of the shape, counted from 0 in cuBLAS's order.

        Added to `onto_TO` in place, if that is given.
        """
        problem = self._problem((len(x_TI), *weight_OI.shape))
        out_TO, share = onto_TO, ctypes.c_float(1)
        if out_TO is None:
            out_TO, share = x_TI.new_empty(len(x_TI), len(weight_OI)), ctypes.c_float(0)
        self._call(
            "Matmul",
            ctypes.c_void_p(torch.cuda.current_blas_handle()),  # it holds one of cublasLt
            problem.description,
            ctypes.byref(ctypes.c_float(1)),
            *(_address(weight_OI), problem.weight, _address(x_TI), problem.x),
            ctypes.byref(share),
            *(_address(out_TO), problem.out, _address(out_TO), problem.out),
            ctypes.byref(problem.algorithms[algorithm].algorithm),
            _address(self._workspace),
            ctypes.c_size_t(WORKSPACE_BYTES),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        return out_TO

    def _problem(self, shape: Shape) -> _Problem:
        if shape not in self._problems:
            self._problems[shape] = self._described(*shape)
        return self._problems[shape]

    def _described(self, rows: int, outputs: int, inputs: int) -> _Problem:
        description = self._create("MatmulDesc", COMPUTE_32F, CUDA_R_32F)
        self._set("MatmulDesc", description, TRANSPOSE_A, ctypes.c_int32(TRANSPOSED))
        weight = self._matrix(inputs, outputs)
        x, out = self._matrix(inputs, rows), self._matrix(outputs, rows)
        return _Problem(description, weight, x, out, self._ranked(description, weight, x, out))

    def _matrix(self, rows: int, columns: int) -> ctypes.c_void_p:
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        return self._create("MatrixLayout", CUDA_R_16BF, *sizes)

    def _ranked(
        self,
        description: ctypes.c_void_p,
        weight: ctypes.c_void_p,
        x: ctypes.c_void_p,
        out: ctypes.c_void_p,
    ) -> list[_Algorithm]:
        """The algorithms in cuBLAS's order."""
        preference = self._create("MatmulPreference")
        limit = ctypes.c_uint64(WORKSPACE_BYTES)
        self._set("MatmulPreference", preference, MAX_WORKSPACE_BYTES, limit)
        found, count = (_Algorithm * MOST_ALGORITHMS)(), ctypes.c_int()
        self._call(
            "MatmulAlgoGetHeuristic",
            ctypes.c_void_p(torch.cuda.current_blas_handle()),
            *(description, weight, x, out, out, preference),
            MOST_ALGORITHMS,
            found,
            ctypes.byref(count),
        )
        return list(found[: count.value])

    def _create(self, kind: str, *arguments: Any) -> ctypes.c_void_p:
        created = ctypes.c_void_p()
        self._call(f"{kind}Create", ctypes.byref(created), *arguments)
        self._created.append((kind, created))
        return created

    def _set(self, kind: str, of: ctypes.c_void_p, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call(f"{kind}SetAttribute", of, attribute, ctypes.byref(value), size)

    def _call(self, name: str, *arguments: Any) -> None:
        call: Callable[..., int] = getattr(self._library, f"cublasLt{name}")
        status = call(*arguments)
        if status:
            raise CublasError(f"cublasLt{name} failed with status {status} of cublasStatus_t")


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _destroy(library: ctypes.CDLL, created: list[tuple[str, ctypes.c_void_p]]) -> None:
    for kind, one in created:
        getattr(library, f"cublasLt{kind}Destroy")(one)
