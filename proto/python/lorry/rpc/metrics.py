"""What a service tells Prometheus: a table of metrics, each read from the service's own state.

Services count in plain numbers and `Histogram`s, and only a scrape turns these into metrics, so
nothing of Prometheus runs where requests do. A label's values come from a closed set, or are things
that there are few of, such as workers, or tenants that a file names; never adapters, versions or a
peer's own words, but for a few values of one label that the deployment has chosen.
"""

import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import (
    Metric as Family,
)
from prometheus_client.registry import Collector

from lorry.rpc.histogram import Histogram

Source = TypeVar("Source")
Labels = tuple[str, ...]
Number = float | Mapping[Any, float]  # a mapping's keys are Labels of any number
Distribution = Histogram | Mapping[Any, Histogram]


class Kind(enum.Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric(Generic[Source]):
    """One row of a table; made by `counter`, `gauge` and `histogram`."""

    kind: Kind
    name: str
    help: str
    read: Callable[[Source], Number | Distribution]  # a mapping if there are labels
    labels: Labels


def counter(
    name: str, help: str, read: Callable[[Source], Number], labels: Labels = ()
) -> Metric[Source]:
    assert name.endswith("_total"), name
    return Metric(Kind.COUNTER, name, help, read, labels)


def gauge(
    name: str, help: str, read: Callable[[Source], Number], labels: Labels = ()
) -> Metric[Source]:
    return Metric(Kind.GAUGE, name, help, read, labels)


def histogram(
    name: str, help: str, read: Callable[[Source], Distribution], labels: Labels = ()
) -> Metric[Source]:
    return Metric(Kind.HISTOGRAM, name, help, read, labels)


class TableCollector(Collector, Generic[Source]):
    """Reads a whole table at each scrape."""

    def __init__(self, table: Sequence[Metric[Source]], source: Source) -> None:
        self._table = table
        self._source = source

    def collect(self) -> Iterator[Family]:
        for metric in self._table:
            yield _family(metric, metric.read(self._source))

    def describe(self) -> list[Family]:
        """Nothing, so that registering reads no state that is not there yet."""
        return []


def registry_of(*collectors: Collector) -> CollectorRegistry:
    """A registry of its own, with the process's CPU time, memory and files beside `collectors`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    for collector in collectors:
        registry.register(collector)
    return registry


def _family(metric: Metric[Source], values: Number | Distribution) -> Family:
    by_labels: Mapping[Any, float | Histogram]
    by_labels = dict(values) if isinstance(values, Mapping) else {(): values}
    if metric.kind is Kind.HISTOGRAM:
        return _histogram_family(metric, by_labels)
    kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in by_labels.items():
        assert not isinstance(value, Histogram)
        family.add_metric(labels, value)
    return family


def _histogram_family(metric: Metric[Source], by_labels: Mapping[Any, float | Histogram]) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, values in by_labels.items():
        assert isinstance(values, Histogram)
        buckets = [(_bound(bound), float(count)) for bound, count in values.buckets()]
        family.add_metric(labels, buckets, values.total)
    return family


def _bound(bound: float) -> str:
    return "+Inf" if math.isinf(bound) else str(bound)
