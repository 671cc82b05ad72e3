import json
from pathlib import Path
from typing import Any

import pytest

from lorry.router.rates import Rates
from lorry.router.slo import Slo
from lorry.router.tenants import Tenant, read_tenants

OTHERS = Tenant(max_queued_requests=10, max_queued_tokens=1000, slo=Slo(ttft_s=2.0, tpot_s=0.5))


def written(tmp_path: Path, tenants: Any) -> Path:
    path = tmp_path / "tenants.json"
    path.write_text(json.dumps({"tenants": tenants}))
    return path


def test_without_a_file_all_tenants_are_equal() -> None:
    tenants = read_tenants(None, OTHERS)
    assert tenants["anyone"] == OTHERS
    assert tenants.weight("anyone") == 1.0


def test_an_entry_overrules_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            "red": {"weight": 3, "slo_ttft_s": 0.5},
            "blue": {"max_queued_requests": 7, "max_queued_tokens": 70, "tokens_per_s": 9},
        },
    )
    tenants = read_tenants(path, OTHERS)
    assert tenants.weight("red") == 3
    assert tenants["red"].slo == Slo(ttft_s=0.5, tpot_s=0.5)
    assert tenants["red"].max_queued_requests == 10
    assert (tenants["blue"].max_queued_requests, tenants["blue"].max_queued_tokens) == (7, 70)
    assert tenants["green"] == OTHERS
    assert (tenants.rates("blue"), tenants.rates("red")) == (Rates(None, 9), Rates())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"red": {"weight": 0}}, "red: weight must be a positive number, got 0"),
        ({"red": {"weight": True}}, "weight must be a positive number, got True"),
        ({"red": {"slo_ttft_s": "1"}}, "slo_ttft_s must be a positive number, got '1'"),
        ({"red": {"max_queued_requests": 1.5}}, "max_queued_requests must be whole"),
        ({"red": {"wait": 1}}, "red: there is no wait"),
        ({"Red": {}}, "tenants: must match"),
        ({"red": 1}, "tenants.json"),
        ([], "tenants.json"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, entry: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_tenants(written(tmp_path, entry), OTHERS)
