"""The figures of a run, from the records of its requests."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lorry.client.bench.record import Record

PERCENTILES = (50, 90, 95, 99)
# What a token costs a tenant, in virtual tokens (VTC, arXiv 2401.00588, section 3).
PROMPT_TOKEN_COST, OUTPUT_TOKEN_COST = 1.0, 2.0


def summary(
    records: Sequence[Record], *, weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Of all requests together and of each tenant; `weights` are the tenants' fair shares."""
    seconds = max((r.ended_s for r in records if r.ended_s is not None), default=0.0)
    by_tenant = defaultdict[str, list[Record]](list)
    for record in records:
        by_tenant[record.planned.tenant].append(record)
    tenants = {name: _figures(by_tenant[name], seconds) for name in sorted(by_tenant)}
    return _figures(records, seconds) | {
        "send_delay_s": percentiles(r.send_delay_s for r in records),
        "tenants": tenants,
        "fairness": fairness(tenants, weights or {}),
    }


def fairness(tenants: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> float:
    """Jain's index of the tenants' service by weight: 1 is equal, 1 / tenants is one takes all.

    It tells of fairness only while every tenant asks for more than it gets.
    """
    shares = np.array([t["service_tokens"] / weights.get(n, 1.0) for n, t in tenants.items()])
    squares = float((shares**2).sum())
    return float(shares.sum()) ** 2 / (len(shares) * squares) if squares else 1.0


def percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """None if there are no values."""
    found = np.array([value for value in values if value is not None], dtype=float)
    if not len(found):
        return None
    points = np.percentile(found, PERCENTILES)
    return {"mean": float(found.mean())} | {
        f"p{percent}": float(point) for percent, point in zip(PERCENTILES, points, strict=True)
    }


def _figures(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    per_s = 1.0 / seconds if seconds else 0.0
    met = sum(record.met_slo for record in records)
    admitted = [record for record in records if record.admitted]
    served = [record for record in records if record.ok]
    output_tokens = sum(record.output_tokens for record in records)
    prompt_tokens = sum(record.planned.prompt_tokens for record in admitted)
    return {
        "requests": len(records),
        "served": len(served),
        "errors": dict(Counter(f"{r.code} {r.reason}".strip() for r in records if not r.ok)),
        "seconds": seconds,
        "req_per_s": len(served) * per_s,
        "out_tok_per_s": output_tokens * per_s,
        "ttft_s": percentiles(record.ttft_s for record in admitted),
        "tpot_s": percentiles(record.tpot_s for record in admitted),
        "latency_s": percentiles(record.latency_s for record in served),
        "attainment": met / len(records) if records else 0.0,
        "attainment_of_admitted": met / len(admitted) if admitted else 0.0,
        "goodput_req_per_s": met * per_s,
        "satisfaction": float(np.mean([r.satisfaction for r in records])) if records else 0.0,
        "service_tokens": PROMPT_TOKEN_COST * prompt_tokens + OUTPUT_TOKEN_COST * output_tokens,
    }
