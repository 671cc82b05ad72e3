"""Moves running sequences along their contexts without computing the tokens between.

So steps can be measured at any context without a prompt's worth of steps before, and for long at
one context.
"""

import numpy as np

from lorry.worker.engine import Engine

FILL_ELEMENTS = 1 << 30


def shift_contexts(engine: Engine, tokens: int, rows: np.ndarray | None = None) -> None:
    """Make running sequences longer by `tokens`, or shorter; all of them unless `rows` says which.

    The KV of tokens that were never computed is what their pages hold. Every count moves alike, so
    steps in flight do not notice. What bounds a sequence's length stays.
    """
    table, pool = engine.scheduler.table, engine.scheduler.pool
    rows = np.flatnonzero(table.is_decoding_R) if rows is None else rows
    for count_R in (
        table.num_prompt_R,
        table.num_read_R,
        table.num_tokens_R,
        table.num_computed_R,
    ):
        count_R[rows] += tokens
    for row in rows.tolist():
        short = table.pages_short(row, int(table.num_tokens_R[row]))
        table.append_pages(row, pool.allocate_kv(short))


def fill_pool(engine: Engine) -> None:
    """Give the pages random numbers, as KV would be: zeros cost less power than they."""
    for part in engine.runner.adapters.pool.slices.view(-1).split(FILL_ELEMENTS):
        part.normal_()


def contexts(engine: Engine) -> np.ndarray:
    """Tokens of the decoding sequences."""
    table = engine.scheduler.table
    return table.num_computed_R[table.is_decoding_R]
