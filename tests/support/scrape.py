"""Reading metrics as Prometheus does: over HTTP, by its own parser."""

import asyncio
import re
import urllib.request
from collections.abc import Callable, Iterable

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 30.0


class Scrape:
    """What one answer holds."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [s for family in self.families.values() for s in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels, whatever the others; 0 if there are none."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    @property
    def names(self) -> set[str]:
        """Of all metrics, as a table of them names them."""
        return {
            family.name + ("_total" if family.type == "counter" else "")
            for family in self.families.values()
        }

    def label_values(self, name: str, label: str) -> set[str]:
        return {sample.labels[label] for sample in self.samples if sample.name == name}


def metrics_url(log: str | Iterable[str]) -> str:
    """Where a service says that its metrics are."""
    found = re.findall(r"metrics at (http://\S+)", log if isinstance(log, str) else "".join(log))
    assert found, f"no metrics in the log: {log}"
    return str(found[-1])


async def scrape_until(url: str, holds: Callable[[Scrape], object]) -> Scrape:
    """The first answer for which `holds` is true; the bound only guards against hanging."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            found = await scrape(url)
            if holds(found):
                return found
            await asyncio.sleep(0.02)


async def scrape(url: str) -> Scrape:
    return Scrape(await asyncio.to_thread(_read, url))


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        body: bytes = response.read()
    return body.decode()
