"""The table of the fastest products."""

import json

from benchmarks.tune_products import update_table


def test_what_was_measured_is_replaced_and_the_rest_kept(tmp_path):
    path, key = tmp_path / "table.json", "NVIDIA H200, cublasLt 130100"
    update_table(path, "NVIDIA H100", 130100, {(1, 64, 32): 3})
    assert json.loads(path.read_text()) == {"NVIDIA H100, cublasLt 130100": {"64x32": {"1": 3}}}
    other = {"NVIDIA H100, cublasLt 130100": {"64x32": {"1": 3}}}
    path.write_text(json.dumps(other | {key: {"64x32": {"1": 2, "8": 5, "16": 1}}}))
    update_table(path, key.split(", ")[0], 130100, {(8, 64, 32): 0, (16, 64, 32): 4})
    assert json.loads(path.read_text()) == other | {key: {"64x32": {"1": 2, "16": 4}}}
    update_table(path, key.split(", ")[0], 130100, {(1, 64, 32): 0, (16, 64, 32): 0})
    assert json.loads(path.read_text()) == other | {key: {}}
