import json
from pathlib import Path
from typing import Any

import pytest

from lorry.client.bench.messages import Share
from lorry.client.bench.processes import run_parts
from lorry.client.bench.record import Record
from lorry.client.bench.trace import TraceRequest
from lorry.rpc.errors import QueueFull
from tests.support.command import Result, child_environment, lorry
from tests.support.scripted import ScriptedAdapters, ScriptedInference, serving_scripted

LENGTHS = ("--prompt-tokens", "2-4", "--output-tokens", "3")


async def bench(*arguments: str, address: str, directory: Path) -> Result:
    environment = child_environment(
        XDG_RUNTIME_DIR=str(directory), LORRY_ROUTER=address, LORRY_STORE=address
    )
    output = ("--output", str(directory / "out"))
    return await lorry("bench", *arguments, *LENGTHS, *output, environment=environment)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_every_request_is_sent_once_and_recorded(tmp_path: Path) -> None:
    inference = ScriptedInference(QueueFull("no room", retry_after_s=1.0))
    async with serving_scripted(inference=inference) as address:
        result = await bench(
            *["--requests", "20", "--rate", "100", "--tenant", "a=1", "--tenant", "b=1"],
            *["--adapters", "3", "--adapter-names", "lora-{n}", "--processes", "2"],
            *["--slo-ttft-s", "60"],
            address=address,
            directory=tmp_path,
        )
    assert (result.status, result.stderr) == (0, "")
    metrics = json.loads((tmp_path / "out/result.json").read_text())["metrics"]
    assert (metrics["requests"], metrics["served"]) == (20, 19)
    assert metrics["errors"] == {"RESOURCE_EXHAUSTED QUEUE_FULL": 1}
    assert metrics["attainment"] == 0.95
    assert sum(tenant["requests"] for tenant in metrics["tenants"].values()) == 20
    records = rows(tmp_path / "out/records.jsonl")
    assert [record["index"] for record in records] == list(range(20))
    assert sum(record["output_tokens"] for record in records) == 19 * 3
    assert all(record["sent_s"] >= record["planned"]["arrival_s"] for record in records)
    assert "<svg" in (tmp_path / "out/report.html").read_text()
    trace = rows(tmp_path / "out/trace.jsonl")
    assert trace == [record["planned"] for record in records]
    asked = sorted((spec.adapter, len(spec.token_ids.ids)) for spec in inference.specs)
    assert asked == sorted((f"adapters/lora-{r['adapter']}", r["prompt_tokens"]) for r in trace)
    assert {spec.stopping.max_tokens for spec in inference.specs} == {3}
    assert {spec.slo.ttft.ToSeconds() for spec in inference.specs} == {60}
    assert not any(spec.slo.HasField("tpot") for spec in inference.specs)


async def test_a_dry_run_shows_the_trace_and_sends_nothing(tmp_path: Path) -> None:
    result = await bench(
        *["--dry-run", "--requests", "5", "--adapters", "3"],
        address="127.0.0.1:1",
        directory=tmp_path,
    )
    assert result.status == 0
    assert "5 in" in result.stdout
    assert len((tmp_path / "out/trace.jsonl").read_text().splitlines()) == 5


async def test_a_store_with_too_few_adapters_is_named(tmp_path: Path) -> None:
    async with serving_scripted(adapters=ScriptedAdapters()) as address:
        result = await bench("--adapters", "2", address=address, directory=tmp_path)
    assert result.status == 1
    assert "needs 2 adapters of tenant default, the store lists 0" in result.stderr


async def test_a_process_that_cannot_start_is_an_error() -> None:
    share = Share(
        router="127.0.0.1:1",
        tokens={},  # none for the tenant, so that the process fails
        tls=None,
        adapters={},
        token_ids=(9, 3),
        timeout_s=1.0,
        max_open=1,
        records=[Record(0, TraceRequest(0.0, -1, 1, 1))],
    )
    with pytest.raises(ChildProcessError, match="ended before its start"):
        await run_parts([share], lambda part, progress: None)
