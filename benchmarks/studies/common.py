"""The policies that studies compare, and what they note of a run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.results_file import write_result
from lorry.client.bench.record import Record
from lorry.client.bench.summary import summary
from lorry.router.policy_options import PolicyOptions

FCFS = PolicyOptions(
    order="arrival",
    overload_order="arrival",
    admission="all",
    fairness="none",
    cluster_adapters=0,
)
SLORA = replace(FCFS, overload_order="newest", admission="slora")
LORRY = PolicyOptions()  # the defaults
KEPT = (
    "requests",
    "served",
    "req_per_s",
    "attainment",
    "attainment_of_admitted",
    "goodput_req_per_s",
    "satisfaction",
    "ttft_s",
)


def figures(records: Sequence[Record]) -> dict[str, Any]:
    found = summary(records)
    return {name: found[name] for name in KEPT}


def interval(differences: Sequence[float]) -> dict[str, float]:
    """The mean and its 95 % confidence interval, by Student's t."""
    values = np.array(differences)
    half = T_95[len(values) - 1] * float(values.std(ddof=1)) / len(values) ** 0.5
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half}


# Quantiles of Student's t at 97.5 %, by degrees of freedom.
T_95 = {
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    19: 2.093,
    29: 2.045,
}


def write_study(
    study: str, config: dict[str, Any], metrics: dict[str, Any], *, part: str = ""
) -> None:
    write_result(
        f"scheduling-{study}{part and '-'}{part}",
        benchmark=f"studies.{study}",
        device="virtual clock",
        config=config,
        metrics=metrics,
    )
