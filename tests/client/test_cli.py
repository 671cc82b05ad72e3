import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lorry.client.cli import app
from lorry.client.console import explain
from lorry.rpc.errors import AdapterNotFound, NoWorker, PermissionDenied, QueueFull
from tests.support.command import Result, child_environment, lorry
from tests.support.scripted import ScriptedAdapters, ScriptedInference, serving_scripted

LONGEST_ID = "a" * 63
COMMANDS = [
    ["up"],
    ["generate"],
    ["adapters", "push"],
    ["adapters", "list"],
    ["adapters", "show"],
    ["adapters", "versions"],
    ["adapters", "pin"],
    ["adapters", "unpin"],
    ["adapters", "pins"],
    ["adapters", "imports"],
    ["adapters", "import-hub"],
    ["adapters", "update"],
    ["adapters", "delete"],
    ["status"],
    ["bench"],
]


class Services:
    """A scripted router and store in one server, and the command pointed at it."""

    def __init__(self, state_dir: Path) -> None:
        self.inference = ScriptedInference()
        self.adapters = ScriptedAdapters()
        self.environment = child_environment(XDG_RUNTIME_DIR=str(state_dir))

    async def lorry(self, *arguments: str, stdin: str = "") -> Result:
        return await lorry(*arguments, environment=self.environment, stdin=stdin)


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    services = Services(tmp_path)
    async with serving_scripted(
        inference=services.inference, adapters=services.adapters
    ) as address:
        services.environment |= {"LORRY_ROUTER": address, "LORRY_STORE": address}
        yield services


@pytest.fixture
def adapter_directory(tmp_path: Path) -> str:
    directory = tmp_path / "reverse"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(bytes(100_000))
    return str(directory)


def train_again(adapter_directory: str) -> None:
    Path(adapter_directory, "adapter_model.safetensors").write_bytes(b"new")


async def test_generate_prints_the_answer(services: Services) -> None:
    result = await services.lorry("generate", "one two", "--adapter", "x", "--max-tokens", "5")
    assert result == Result(0, "onetwo\n", "")
    (spec,) = services.inference.specs
    assert (spec.adapter, spec.stopping.max_tokens) == ("adapters/x", 5)


async def test_an_error_in_mid_stream_begins_a_line(tmp_path: Path) -> None:
    async with serving_scripted(inference=ScriptedInference(break_after=2)) as address:
        environment = child_environment(XDG_RUNTIME_DIR=str(tmp_path), LORRY_ROUTER=address)
        result = await lorry("generate", "one two three", environment=environment)
    assert (result.status, result.stdout) == (1, "onetwo\n")
    assert result.stderr.startswith("lorry: ")


async def test_generate_is_greedy_unless_asked_otherwise(services: Services) -> None:
    await services.lorry("generate", "a")
    await services.lorry("generate", "a", "--temperature", "0.5", "--seed", "7")
    greedy, drawn = services.inference.specs
    assert greedy.sampling.HasField("temperature")
    assert greedy.sampling.temperature == 0
    assert (drawn.sampling.temperature, drawn.sampling.seed) == (0.5, 7)


async def test_generate_reads_a_dash_from_standard_input(services: Services) -> None:
    result = await services.lorry("generate", "-", stdin="from a pipe")
    assert result.stdout == "fromapipe\n"


async def test_generate_shows_counts_and_times_on_stderr(services: Services) -> None:
    result = await services.lorry("generate", "a b", "--stats")
    assert result.stdout == "ab\n"
    assert "2 prompt tokens, 2 tokens" in result.stderr


async def test_generate_shows_logprobs_on_stderr(services: Services) -> None:
    result = await services.lorry("generate", "a b", "--logprobs", "2", "--min-p", "0.5")
    assert result.stdout == "ab\n"
    rows = [line.split() for line in result.stderr.splitlines()[1:]]
    top = ["70", "-0.250,", "71", "-1.250"]
    assert rows == [["0", "-0.500", *top], ["1", "-0.500", *top]]
    assert services.inference.specs[0].sampling.min_p == 0.5


async def test_generate_shows_logprobs_of_the_prompt_on_stderr(services: Services) -> None:
    result = await services.lorry("generate", "a b c", "--prompt-logprobs", "1")
    assert result.stdout == "abc\n"
    rows = [line.split() for line in result.stderr.splitlines()[1:]]
    assert rows == [["9", "-0.500", "70", "-0.250"]] * 2


async def test_generate_sends_what_changes_the_odds_and_the_end(services: Services) -> None:
    options = "--repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 0.5"
    options += " --logit-bias 7=-100 --logit-bias 8=0.5 --min-tokens 2 --stop-token-id 9"
    result = await services.lorry("generate", "a b", *options.split(), "--ignore-eos")
    assert result.stdout == "ab\n"
    (spec,) = services.inference.specs
    sampling, stopping = spec.sampling, spec.stopping
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -1)
    assert sampling.frequency_penalty == 0.5
    assert dict(sampling.logit_bias) == {7: -100, 8: 0.5}
    assert (stopping.min_tokens, list(stopping.stop_token_ids)) == (2, [9])
    assert stopping.ignore_eos


async def test_a_bias_that_is_none_is_named(services: Services) -> None:
    result = await services.lorry("generate", "a b", "--logit-bias", "x=1")
    assert result.status == 1
    assert "ID=BIAS, got 'x=1'" in result.stderr


@pytest.mark.parametrize(
    ("error", "next_step"),
    [
        (AdapterNotFound("adapter 'x' is not registered"), "lorry adapters list"),
        (NoWorker("no worker is ready", retry_after_s=1000), "lorry status"),
        (QueueFull("the queue is full", retry_after_s=1.5), "try again in 1.5 s"),
    ],
    ids=lambda value: getattr(value, "reason", None),
)
async def test_a_failure_is_one_line_with_the_next_step(
    services: Services, error: Exception, next_step: str
) -> None:
    services.inference.script.fail_next(error)
    result = await services.lorry("generate", "a")
    assert (result.status, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert str(error) in line
    assert next_step in line


def test_another_role_is_proposed_only_where_the_role_is_refused() -> None:
    of_role = PermissionDenied("the caller's role may not call it", method="/lorry.v1.S/M")
    of_settings = PermissionDenied("my-org/sql matches no pattern (--hub-allow)")
    assert explain(of_role).endswith(" (use a token of a role that may do this)")
    assert explain(of_settings) == str(of_settings)


async def test_no_service_is_one_line_that_names_lorry_up(tmp_path: Path) -> None:
    environment = child_environment(XDG_RUNTIME_DIR=str(tmp_path), LORRY_ROUTER="127.0.0.1:1")
    result = await lorry("generate", "a", environment=environment)
    assert result.status == 1
    (line,) = result.stderr.splitlines()
    assert "127.0.0.1:1" in line
    assert "`lorry up`" in line


async def test_adapters_are_pushed_listed_shown_and_deleted(
    services: Services, adapter_directory: str
) -> None:
    pushed = await services.lorry("adapters", "push", adapter_directory, "--label", "team=a")
    assert pushed.status == 0
    assert pushed.stdout.startswith("tenants/default/adapters/reverse version ")
    listed = await services.lorry("adapters", "list")
    assert "tenants/default/adapters/reverse" in listed.stdout
    assert "team=a" in listed.stdout
    shown = await services.lorry("adapters", "show", "reverse")
    (adapter,) = services.adapters.adapters.values()
    assert adapter.version.hex() in shown.stdout
    deleted = await services.lorry("adapters", "delete", "reverse")
    assert deleted.status == 0
    assert not services.adapters.adapters


async def test_push_to_a_name_in_use_names_the_option_that_replaces(
    services: Services, adapter_directory: str
) -> None:
    await services.lorry("adapters", "push", adapter_directory)
    same = await services.lorry("adapters", "push", adapter_directory)
    assert same.status == 0
    assert same.stdout.endswith("(unchanged)\n")
    train_again(adapter_directory)
    refused = await services.lorry("adapters", "push", adapter_directory)
    assert refused.status == 1
    assert "--replace" in refused.stderr
    replaced = await services.lorry("adapters", "push", adapter_directory, "--replace")
    assert replaced.status == 0


async def test_many_adapters_are_pushed_each_to_its_own_end(
    services: Services, adapter_directory: str, tmp_path: Path
) -> None:
    weights = tmp_path / "upper.safetensors"
    weights.write_bytes(b"other")
    (tmp_path / "adapter_config.json").write_text("{}")
    paths = [adapter_directory, str(tmp_path / "nothing"), str(weights)]
    result = await services.lorry("adapters", "push", *paths, "--parallel", "1")
    assert result.status == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "tenants/default/adapters/reverse",
        "tenants/default/adapters/upper",
    ]
    failure, summary = result.stderr.splitlines()
    assert "nothing holds no adapter_config.json" in failure
    assert "1 of 3 adapters were not pushed" in summary


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "at least one directory"),
        (["a", "b", "--name", "x"], "for one path"),
        (["a/same", "b/same"], "2 of the paths would be pushed as 'same'"),
        (["a/Not_An_Id"], "Not_An_Id"),
        (["a", "--parallel", "0"], "--parallel"),
    ],
)
async def test_what_cannot_be_pushed_is_named_before_anything_is_sent(
    services: Services, options: list[str], problem: str
) -> None:
    result = await services.lorry("adapters", "push", *options)
    assert result.status == 1
    assert problem in result.stderr
    assert services.adapters.script.calls == 0


@pytest.mark.parametrize(
    ("file", "options", "problem"),
    [
        ("my_sql.safetensors", [], "got 'my_sql'; --name gives it another"),
        ("my_sql.safetensors", ["--config", "c.json"], "got 'my_sql'; --name gives it another"),
        ("adapter_model.bin", [], "adapter_model.bin is no .safetensors file"),
        ("adapter_model.bin", ["--name", "sql"], "adapter_model.bin is no .safetensors file"),
        ("README.md", [], "README.md is no .safetensors file"),
        ("sql.safetensors", [], "sql.safetensors has no adapter_config.json beside it"),
    ],
    ids=str,
)
async def test_a_file_that_cannot_be_pushed_is_refused_with_what_to_give(
    services: Services, tmp_path: Path, file: str, options: list[str], problem: str
) -> None:
    (tmp_path / file).write_bytes(b"weights")
    result = await services.lorry("adapters", "push", str(tmp_path / file), *options)
    assert result.status == 1
    assert problem in result.stderr
    assert services.adapters.script.calls == 0


async def test_an_adapter_is_described_and_rolled_back(
    services: Services, adapter_directory: str
) -> None:
    await services.lorry("adapters", "push", adapter_directory)
    train_again(adapter_directory)
    await services.lorry("adapters", "push", adapter_directory, "--replace")
    listed = await services.lorry("adapters", "versions", "reverse")
    newest, oldest = (line.split() for line in listed.stdout.splitlines()[1:])
    assert (newest[0], oldest[0]) == ("*", services.adapters.versions[1].digest.hex())
    change = ["--version", oldest[0][:8], "--description", "the old one", "--label", "team=b"]
    changed = await services.lorry("adapters", "update", "reverse", *change)
    assert changed.status == 0
    (adapter,) = services.adapters.adapters.values()
    assert adapter.version.hex() == oldest[0]
    assert (adapter.description, dict(adapter.labels)) == ("the old one", {"team": "b"})
    unclear = await services.lorry("adapters", "update", "reverse", "--version", "")
    assert "2 versions; `lorry adapters versions reverse` lists them all" in unclear.stderr


async def test_a_pipe_gets_the_longest_name_uncut(
    services: Services, adapter_directory: str
) -> None:
    await services.lorry("adapters", "push", adapter_directory, "--name", LONGEST_ID)
    listed = await services.lorry("adapters", "list")
    assert f"tenants/default/adapters/{LONGEST_ID} " in listed.stdout


async def test_status_fails_unless_every_service_is_ready(services: Services) -> None:
    result = await services.lorry("status", "--worker", "127.0.0.1:1")
    assert result.status == 1
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert lines["router"].split()[-1] == "ready"
    assert lines["adapter store"].split()[-1] == "ready"
    assert "not reachable" in lines["worker"]


@pytest.mark.parametrize("alive", [True, False])
async def test_the_state_file_is_used_only_while_its_lorry_up_lives(
    services: Services, tmp_path: Path, alive: bool
) -> None:
    gone = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await gone.wait()
    address = services.environment.pop("LORRY_ROUTER")
    endpoints = {"router": address, "store": address, "worker": address}
    state = {"pid": os.getpid() if alive else gone.pid, "endpoints": endpoints}
    (tmp_path / "lorry-up.json").write_text(json.dumps(state))
    result = await services.lorry("status")
    assert (address in result.stdout) is True  # the store's, from LORRY_STORE
    assert ("127.0.0.1:50051" in result.stdout) is not alive


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_tells_units_and_variables(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    app([*command, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    variable = "LORRY_UP_GRACE_S" if command == ["up"] else "LORRY_TIMEOUT_S"
    assert f"[env var: {variable}]" in text
    assert "Seconds that" in text


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['rich'] = None; from lorry.client.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "status"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "pip install 'lorry[client]'" in result.stderr
    assert "Traceback" not in result.stderr


async def test_a_service_that_speaks_no_tls_is_one_line(services: Services, tmp_path: Path) -> None:
    app(["certs", "make", str(tmp_path / "secrets"), "client"])
    tls = str(tmp_path / "secrets" / "client")
    result = await services.lorry("generate", "a", "--tls", tls, "--timeout-s", "2")
    assert result.status == 1
    assert result.stderr.startswith("lorry: no connection")
    assert result.stderr.count("\n") == 1


async def test_a_reader_that_goes_away_ends_the_command_quietly(services: Services) -> None:
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m lorry.client.main generate '{'word ' * 20_000}' | head -c 8",
        env=services.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert (stdout, stderr) == (b"wordword", b"")
