"""What the processes of a run tell each other: JSON, a message a line."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from lorry.client.bench.record import Record, Slo
from lorry.client.bench.trace import TraceRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one process of a run is to do."""

    router: str
    tokens: dict[str, str | None]  # bearer token, by tenant
    tls: str | None  # directory of certificates
    adapters: dict[str, list[str]]  # names, by tenant
    token_ids: tuple[int, int]
    timeout_s: float
    max_open: int
    records: list[Record]


@dataclass(frozen=True, slots=True)
class Progress:
    """What is new in one process: requests sent in all, and records of those that have ended.

    The first one says that the process is ready to start.
    """

    sent: int
    ended: list[Record]


def write_share(share: Share) -> bytes:
    return _line(dataclasses.asdict(share))


def read_share(line: bytes) -> Share:
    row = json.loads(line)
    row["records"] = [read_record(record) for record in row["records"]]
    row["token_ids"] = tuple(row["token_ids"])
    return Share(**row)


def write_start(start_s: float) -> bytes:
    """When the trace begins, of time.monotonic, which all processes of a machine share."""
    return json.dumps(start_s).encode() + b"\n"


def read_start(line: bytes) -> float:
    return float(json.loads(line))


def write_progress(progress: Progress) -> bytes:
    return _line(dataclasses.asdict(progress))


def read_progress(line: bytes) -> Progress:
    row = json.loads(line)
    return Progress(row["sent"], [read_record(record) for record in row["ended"]])


def read_record(row: dict[str, Any]) -> Record:
    return Record(**row | {"planned": TraceRequest(**row["planned"]), "slo": Slo(**row["slo"])})


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
