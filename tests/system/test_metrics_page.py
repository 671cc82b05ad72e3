"""The tables of metrics, the page that documents them and the dashboard that shows them."""

import json
import re

from deploy.metrics_page import PAGE, SERVICES, page
from lorry.rpc.metrics import Kind
from tests.support.command import REPO

DASHBOARD = REPO / "deploy" / "dashboard.json"


def test_the_page_is_that_of_the_tables() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_names_have_their_service_and_their_unit() -> None:
    for metric in (m for table in SERVICES.values() for m in table):
        assert re.match(r"lorry_(router|worker|store)_[a-z_]+$", metric.name)
        assert metric.name.endswith("_total") is (metric.kind is Kind.COUNTER)
        assert not re.search(r"_(ms|s|mib|gib|kb)(_|$)", metric.name)


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    metrics = {m.name: m for table in SERVICES.values() for m in table}
    kinds = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
    labels = {
        f"{name}{suffix}": {*metric.labels, "le"}
        for name, metric in metrics.items()
        for suffix in kinds.get(metric.kind, ("",))
    }
    panels = json.loads(DASHBOARD.read_text())["panels"]
    targets = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(panels) > 10
    for expression in targets:
        shown = re.findall(r"lorry_\w+", expression)
        assert shown
        assert set(shown) <= labels.keys()
        for group in re.findall(r"by \(([\w, ]+)\)", expression):
            assert set(group.split(", ")) <= labels[shown[0]]
