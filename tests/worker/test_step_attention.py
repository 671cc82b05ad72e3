import torch

from lorry.kernels.launch_settings import SMALL_ROWS
from lorry.kernels.paged_attention import paged_attention_reference
from lorry.worker.side_stream import IN_ORDER
from lorry.worker.step_attention import AttendedRows, CachedSequences, balanced_attention
from tests.support.kernel_cases import LAYER, TOLERANCE, layout_of, relative_error, store_sequences

LENGTHS = [(70, 1), (33, 3), (5, 1)]


def test_steps_of_any_number_of_rows_match_the_reference() -> None:
    """Of few rows by one kernel, of more by two forms of another."""
    layout = layout_of("tiny", torch.float32)
    shape = layout.geometry
    sequences = store_sequences(LENGTHS, layout, torch.device("cpu"), padding=1)
    cached = CachedSequences(sequences.pool, sequences.block_table_SP)
    attention = balanced_attention(cached, [None, 20], IN_ORDER, max_rows=8)
    q_TQD = torch.randn(len(sequences.sequence_T), shape.heads, shape.head_dim)
    for window in (None, 20):
        expected = paged_attention_reference(
            q_TQD,
            sequences.pool,
            LAYER,
            sequences.position_T.long(),
            sequences.block_table_SP.long(),
            sequences.tiles(),
            window,
        )
        for rows in (1, SMALL_ROWS, len(q_TQD)):
            step = AttendedRows(sequences.sequence_T[:rows], sequences.position_T[:rows])
            out_TQD = torch.full_like(q_TQD[:rows], torch.nan)
            attention[window].plan(step)
            attention[window].attend(q_TQD[:rows], LAYER, step, out_TQD)
            is_row = step.sequence_T >= 0
            error = relative_error(out_TQD[is_row], expected[:rows][is_row])
            assert error < TOLERANCE[torch.float32]
            assert out_TQD[~is_row].isnan().all()
