"""A worker's page layout as the store receives it."""

from lorry.kernels.page_layout import (
    LAYOUT_REVISION,
    Dtype,
    ModelGeometry,
    PageLayout,
    TpStrategy,
)
from lorry.rpc.base_model import BaseModel
from lorry.rpc.errors import LayoutUnsupported
from lorry.v1 import adapter_data_service_pb2 as pb

DTYPES = {Dtype.BF16: pb.DTYPE_BF16, Dtype.FP16: pb.DTYPE_FP16, Dtype.FP32: pb.DTYPE_FP32}
STRATEGIES = {
    None: pb.TP_STRATEGY_UNSPECIFIED,
    TpStrategy.SLORA: pb.TP_STRATEGY_SLORA,
    TpStrategy.REPLICATED: pb.TP_STRATEGY_REPLICATED,
}


def layout_to_proto(layout: PageLayout, model_digest: bytes) -> pb.PageLayout:
    return pb.PageLayout(
        model_digest=model_digest,
        dtype=DTYPES[layout.dtype],
        page_tokens=layout.page_tokens,
        slice_bytes=layout.slice_bytes,
        row_unit=layout.row_unit,
        tp_size=layout.tp_size,
        tp_rank=layout.tp_rank,
        tp_strategy=STRATEGIES[layout.tp_strategy],
        layout_revision=layout.revision,
    )


def layout_from_proto(message: pb.PageLayout, base_model: BaseModel) -> PageLayout:
    """The layout that a worker asks for; raises LayoutUnsupported if this side computes another."""
    try:
        layout = PageLayout(
            geometry=_geometry_of(message, base_model),
            dtype={proto: dtype for dtype, proto in DTYPES.items()}[message.dtype],
            page_tokens=message.page_tokens,
            tp_size=message.tp_size,
            tp_rank=message.tp_rank,
            tp_strategy={proto: s for s, proto in STRATEGIES.items()}[message.tp_strategy],
        )
    except (KeyError, ValueError) as error:
        raise LayoutUnsupported(f"layout: {error}") from error
    expected = layout_to_proto(layout, base_model.digest)
    for field in ("layout_revision", "slice_bytes", "row_unit"):
        asked, computed = getattr(message, field), getattr(expected, field)
        if asked != computed:
            raise LayoutUnsupported(f"layout.{field} must be {computed} here, got {asked}")
    return layout


def _geometry_of(message: pb.PageLayout, base_model: BaseModel) -> ModelGeometry:
    if message.layout_revision != LAYOUT_REVISION:
        raise ValueError(f"layout_revision {message.layout_revision} is not {LAYOUT_REVISION}")
    if message.model_digest != base_model.digest:
        raise ValueError(
            f"model_digest {message.model_digest.hex()} is not the digest of the base model here, "
            f"{base_model.digest.hex()}"
        )
    return base_model.geometry
