import pytest

from lorry.rpc.errors import InvalidRequest
from lorry.rpc.names import AdapterName, check_id


def test_a_short_name_is_of_the_callers_tenant() -> None:
    assert AdapterName.parse("adapters/sql", tenant="acme") == ("acme", "sql")


def test_a_full_name_keeps_its_tenant() -> None:
    name = AdapterName.parse("tenants/other/adapters/sql", tenant="acme")
    assert name == ("other", "sql")
    assert str(name) == "tenants/other/adapters/sql"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sql",
        "adapters/",
        "adapters/SQL",
        "adapters/a_b",
        "adapters/../x",
        "adapters/a/b",
        "adapters/a\n",
        "/adapters/a",
        "tenants//adapters/a",
        "tenants/t/adapters/a/",
        "tenants/t/adapters/é",
        "adapters/" + "a" * 64,
    ],
)
def test_anything_else_is_refused_by_field_and_value(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"spec\.adapter: must be adapters/ID") as refused:
        AdapterName.parse(text, tenant="acme", field="spec.adapter")
    assert refused.value.violations[0].field == "spec.adapter"


@pytest.mark.parametrize("text", ["a", "0", "a-b", "a--b", "a" * 63])
def test_an_id_is_returned_as_it_is(text: str) -> None:
    assert check_id(text, field="id") == text


@pytest.mark.parametrize("text", ["", "-", "-a", "a-", "A", "a.b", "a b", "a\n", "a" * 64])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="id: must match"):
        check_id(text, field="id")
