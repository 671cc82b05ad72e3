"""The running sequences as arrays, so that a step's bookkeeping has no loop over requests.

Each running request has a stable row. Shape suffixes: R = rows, C = context, P = pages of a
sequence, X = stop tokens, B = biases.
"""

import numpy as np

from lorry.worker.messages import NOT_ASKED, Submit
from lorry.worker.request import NO_ROW, Request

NO_TOKEN = -1
MAX_STOP_IDS = 128  # of a request: 64 of the client, and the model's
MAX_LOGIT_BIASES = 300  # of a request


class SequenceTable:
    """State of the running sequences by row."""

    def __init__(self, num_rows: int, max_context_tokens: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.requests: list[Request | None] = [None] * num_rows
        self.token_ids_RC = np.zeros((num_rows, max_context_tokens), dtype=np.int32)
        self.block_table_RP = np.zeros(
            (num_rows, -(-max_context_tokens // page_tokens)), dtype=np.int32
        )
        self.stop_ids_RX = np.full((num_rows, 4), NO_TOKEN, dtype=np.int32)
        self.num_stop_ids_R = np.zeros(num_rows, dtype=np.int32)
        self.num_pages_R = np.zeros(num_rows, dtype=np.int32)
        self.num_prompt_R = np.zeros(num_rows, dtype=np.int32)
        # Tokens whose id is in token_ids_RC.
        self.num_read_R = np.zeros(num_rows, dtype=np.int32)
        # Those and the ones drawn by launched steps whose results are not read yet.
        self.num_tokens_R = np.zeros(num_rows, dtype=np.int32)
        # Tokens whose KV is in pages, or is by the end of the steps launched so far.
        self.num_computed_R = np.zeros(num_rows, dtype=np.int32)
        # Those of them whose step's results are read.
        self.num_done_R = np.zeros(num_rows, dtype=np.int32)
        self.num_offered_R = np.zeros(num_rows, dtype=np.int32)  # pages, to the prefix cache
        self.most_tokens_R = np.zeros(num_rows, dtype=np.int32)
        self.min_tokens_R = np.zeros(num_rows, dtype=np.int32)  # of prompt and output
        self.number_R = np.zeros(num_rows, dtype=np.int64)  # the request's
        self.admission_R = np.zeros(num_rows, dtype=np.int64)  # never the same again
        self.is_decoding_R = np.zeros(num_rows, dtype=np.bool_)
        self.awaits_first_R = np.zeros(num_rows, dtype=np.bool_)  # its first token since admission
        self.slot_R = np.zeros(num_rows, dtype=np.int32)
        self.temperature_R = np.zeros(num_rows, dtype=np.float32)
        self.top_k_R = np.zeros(num_rows, dtype=np.int32)
        self.top_p_R = np.ones(num_rows, dtype=np.float32)
        self.min_p_R = np.zeros(num_rows, dtype=np.float32)
        self.top_logprobs_R = np.full(num_rows, NOT_ASKED, dtype=np.int32)
        self.prompt_logprobs_R = np.full(num_rows, NOT_ASKED, dtype=np.int32)
        self.num_prompt_reported_R = np.zeros(num_rows, dtype=np.int32)  # by launched steps
        self.seed_R = np.zeros(num_rows, dtype=np.int64)  # the bits of an unsigned seed
        self.repetition_R = np.ones(num_rows, dtype=np.float32)
        self.presence_R = np.zeros(num_rows, dtype=np.float32)
        self.frequency_R = np.zeros(num_rows, dtype=np.float32)
        self.bias_id_RB = np.zeros((num_rows, MAX_LOGIT_BIASES), dtype=np.int32)
        self.bias_RB = np.zeros((num_rows, MAX_LOGIT_BIASES), dtype=np.float32)
        self.num_biases_R = np.zeros(num_rows, dtype=np.int32)
        self.is_penalized_R = np.zeros(num_rows, dtype=np.bool_)
        self.is_adjusted_R = np.zeros(num_rows, dtype=np.bool_)  # penalized or biased
        self.may_be_adjusted_R = np.zeros(num_rows, dtype=np.bool_)  # or has a min_tokens
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._admissions = 0

    def add(self, request: Request, slot: int, pages: list[int]) -> None:
        """Give `request` a row that begins with `pages`, full and computed by others."""
        submit, row = request.submit, self._free_rows.pop()
        assert request.row == NO_ROW
        request.row = row
        self.requests[row] = request
        self.token_ids_RC[row, : len(request.token_ids)] = request.token_ids
        self._set_stop_ids(row, submit.stop_token_ids)
        self.num_pages_R[row] = 0
        self.append_pages(row, pages)
        self.num_prompt_R[row] = request.prompt_tokens
        self.num_read_R[row] = self.num_tokens_R[row] = len(request.token_ids)
        self.num_offered_R[row] = len(pages)
        self.num_computed_R[row] = self.num_done_R[row] = len(pages) * self.page_tokens
        self.most_tokens_R[row] = request.most_tokens
        self.min_tokens_R[row] = request.prompt_tokens + submit.min_tokens
        self._admissions += 1
        self.admission_R[row] = self._admissions
        self.awaits_first_R[row] = True
        self.number_R[row] = request.number
        self.slot_R[row] = slot
        self.temperature_R[row] = submit.temperature
        self.top_k_R[row] = submit.top_k
        self.top_p_R[row] = submit.top_p
        self.min_p_R[row] = submit.min_p
        self.top_logprobs_R[row] = NOT_ASKED if submit.top_logprobs is None else submit.top_logprobs
        asked = submit.prompt_logprobs
        self.prompt_logprobs_R[row] = NOT_ASKED if asked is None else asked
        self.num_prompt_reported_R[row] = request.num_prompt_reported
        self.seed_R[row] = np.uint64(submit.seed).astype(np.int64)
        self._set_adjustments(row, submit)

    def remove(self, request: Request) -> list[int]:
        """Take `request`'s row, keep the tokens that were read, and return its pages.

        A token that was drawn but not read is drawn again, equal, when the request is recomputed.
        """
        row = request.row
        pages: list[int] = self.pages(row)
        request.token_ids = self.token_ids_RC[row, : self.num_read_R[row]].copy()
        request.row = NO_ROW
        self.requests[row] = None
        self.num_pages_R[row] = 0
        self.is_decoding_R[row] = False
        self.admission_R[row] = 0
        self._free_rows.append(row)
        return pages

    def pages(self, row: int) -> list[int]:
        pages: list[int] = self.block_table_RP[row, : self.num_pages_R[row]].tolist()
        return pages

    def append_pages(self, row: int, pages: list[int]) -> None:
        count = self.num_pages_R[row]
        self.block_table_RP[row, count : count + len(pages)] = pages
        self.num_pages_R[row] = count + len(pages)

    def append_page_each(self, rows: np.ndarray, pages: list[int]) -> None:
        """A page for each of the rows."""
        self.block_table_RP[rows, self.num_pages_R[rows]] = pages
        self.num_pages_R[rows] += 1

    def pages_short(self, row: int, tokens: int) -> int:
        """Pages that the row lacks to hold `tokens` tokens."""
        return max(0, -(-tokens // self.page_tokens) - int(self.num_pages_R[row]))

    def is_stop(self, rows: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Whether each row's newest token, already counted, is one of its stop tokens."""
        stopped: np.ndarray = (self.stop_ids_RX[rows] == token_ids[:, None]).any(axis=1)
        return stopped

    def _set_adjustments(self, row: int, submit: Submit) -> None:
        self.repetition_R[row] = submit.repetition_penalty
        self.presence_R[row] = submit.presence_penalty
        self.frequency_R[row] = submit.frequency_penalty
        count = self.num_biases_R[row] = len(submit.logit_bias)
        self.bias_id_RB[row, :count] = list(submit.logit_bias.keys())
        self.bias_RB[row, :count] = list(submit.logit_bias.values())
        is_penalized = submit.repetition_penalty != 1 or bool(
            submit.presence_penalty or submit.frequency_penalty
        )
        self.is_penalized_R[row] = is_penalized
        self.is_adjusted_R[row] = is_penalized or count > 0
        self.may_be_adjusted_R[row] = self.is_adjusted_R[row] or submit.min_tokens > 0

    def _set_stop_ids(self, row: int, stop_ids: list[int]) -> None:
        width = self.stop_ids_RX.shape[1]
        if len(stop_ids) > width:
            self.stop_ids_RX = np.pad(
                self.stop_ids_RX,
                ((0, 0), (0, len(stop_ids) - width)),
                constant_values=NO_TOKEN,
            )
        self.stop_ids_RX[row] = NO_TOKEN
        self.stop_ids_RX[row, : len(stop_ids)] = stop_ids
        self.num_stop_ids_R[row] = len(stop_ids)
