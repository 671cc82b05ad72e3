"""A page layout as JSON, for files and pipes that are the store's own. The geometry stays out."""

from collections.abc import Mapping
from typing import Any

from lorry.kernels.page_layout import Dtype, ModelGeometry, PageLayout, TpStrategy


def layout_to_json(layout: PageLayout) -> dict[str, Any]:
    strategy = layout.tp_strategy
    return {
        "dtype": layout.dtype.value,
        "page_tokens": layout.page_tokens,
        "tp_size": layout.tp_size,
        "tp_rank": layout.tp_rank,
        "tp_strategy": None if strategy is None else strategy.value,
        "revision": layout.revision,
    }


def layout_from_json(fields: Mapping[str, Any], geometry: ModelGeometry) -> PageLayout:
    strategy = fields["tp_strategy"]
    return PageLayout(
        **{
            **fields,
            "geometry": geometry,
            "dtype": Dtype(fields["dtype"]),
            "tp_strategy": None if strategy is None else TpStrategy(strategy),
        }
    )
