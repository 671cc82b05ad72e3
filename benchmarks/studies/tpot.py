"""What it brings to steer by objectives for the time per output token.

    python -m benchmarks.studies.tpot

By load, where all requests ask for the same; and over four workers where some ask for quick tokens
and the others for none: with the objectives kept, and with them only counted.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.progress import track

from benchmarks.simulation import h200
from benchmarks.simulation.run import simulate
from benchmarks.studies.common import LORRY, write_study
from benchmarks.studies.load import LOADS, capacity_req_per_s
from lorry.client.bench.record import Record, Slo
from lorry.client.bench.summary import percentiles
from lorry.client.bench.trace import TraceSpec, make_trace, merged

ADAPTERS = 200
ALIKE = Slo(ttft_s=1.0, tpot_s=0.020)
QUICK, PATIENT = Slo(ttft_s=1.0, tpot_s=0.012), Slo(ttft_s=5.0)
WORKERS, QUICK_SHARE = 4, 0.25
COMPARED = {"kept": LORRY, "counted": replace(LORRY, tpot_share=0.0)}


def figures(records: Sequence[Record]) -> dict[str, Any]:
    served = [record for record in records if record.ok]
    met = sum(record.met_slo for record in records)
    return {
        "attainment": met / len(records),
        "attainment_of_served": met / max(1, len(served)),
        "goodput_req_per_s": met / records[-1].planned.arrival_s,
        "tpot_s": percentiles(record.tpot_s for record in served),
    }


def alike(rate: float, seconds: float) -> dict[str, Any]:
    """All ask for the same."""
    trace = make_trace(TraceSpec(requests=int(rate * seconds), adapters=ADAPTERS, rate=rate))
    return {
        name: figures(simulate(replace(h200.fitted(), options=options, slo=ALIKE), trace))
        for name, options in COMPARED.items()
    }


def mixed(rate: float, seconds: float) -> dict[str, Any]:
    """One tenant asks for quick tokens, the other for none."""
    rates = {"quick": QUICK_SHARE * rate, "patient": (1 - QUICK_SHARE) * rate}
    traces = [
        make_trace(
            TraceSpec(
                requests=int(part * seconds),
                adapters=ADAPTERS // 2,
                rate=part,
                tenants={name: 1.0},
                seed=seed,
            )
        )
        for seed, (name, part) in enumerate(rates.items())
    ]
    setting = replace(
        h200.fitted(), num_workers=WORKERS, tenant_slos={"quick": QUICK, "patient": PATIENT}
    )
    found = {}
    for name, options in COMPARED.items():
        records = simulate(replace(setting, options=options), merged(*traces))
        found[name] = {
            tenant: figures([r for r in records if r.planned.tenant == tenant]) for tenant in rates
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    capacity, seconds = capacity_req_per_s(), arguments.seconds
    cells = [
        {"load": load, "alike": alike(load * capacity, seconds)}
        | {"mixed": mixed(load * capacity * WORKERS, seconds)}
        for load in track(LOADS, description="loads")
    ]
    config = {
        "seconds": seconds,
        "adapters": ADAPTERS,
        "workers_mixed": WORKERS,
        "quick_share": QUICK_SHARE,
        "alike_tpot_slo_s": ALIKE.tpot_s,
        "quick_tpot_slo_s": QUICK.tpot_s,
    }
    write_study("tpot", config, {"capacity_req_per_s": capacity, "cells": cells})


if __name__ == "__main__":
    main()
