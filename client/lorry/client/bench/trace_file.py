"""Traces as files: a JSON object a line, by arrival.

    {"arrival_s": 0.41, "adapter": 17, "prompt_tokens": 128, "output_tokens": 64, "tenant": "a"}

`adapter` -1 is the base model; `tenant` may be left out, and other fields are ignored.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorry.client.bench.trace import DEFAULT_TENANT, NO_ADAPTER, TraceRequest

_LEAST = {"arrival_s": 0, "adapter": NO_ADAPTER, "prompt_tokens": 1, "output_tokens": 1}


def write_trace(path: Path, trace: Iterable[TraceRequest]) -> None:
    lines = (json.dumps(dataclasses.asdict(request)) + "\n" for request in trace)
    path.write_text("".join(lines))


def read_trace(path: Path) -> list[TraceRequest]:
    """Raises ValueError naming the file, line and field of what is no request."""
    lines = enumerate(path.read_text().splitlines(), start=1)
    trace = [_request(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not trace:
        raise ValueError(f"{path} has no requests")
    if any(a.arrival_s > b.arrival_s for a, b in itertools.pairwise(trace)):
        raise ValueError(f"{path} is not in the order of arrival_s")
    return trace


def _request(place: str, line: str) -> TraceRequest:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: must be an object, got {line[:80]!r}")
    for name, least in _LEAST.items():
        value, kinds = row.get(name), (int, float) if name == "arrival_s" else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool) or not value >= least:
            kind = "number" if name == "arrival_s" else "whole number"
            raise ValueError(f"{place}: {name} must be a {kind} of at least {least}, got {value!r}")
    tenant = row.get("tenant", DEFAULT_TENANT)
    if not isinstance(tenant, str):
        raise ValueError(f"{place}: tenant must be a string, got {tenant!r}")
    return TraceRequest(tenant=tenant, **{name: row[name] for name in _LEAST})
