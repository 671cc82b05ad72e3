"""Every service names what it cannot serve of a base model, and does not start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.byte_model import write_byte_model
from tests.support.command import child_environment

REQUIRED = {
    "router": ["--store", "127.0.0.1:1", "--worker", "127.0.0.1:1"],
    "adapter_store": ["--backend", "file:///tmp/none"],
    "worker": ["--store", "127.0.0.1:1"],
}


@pytest.mark.parametrize("service", REQUIRED)
def test_an_unsupported_model_ends_the_start_by_name(service: str, tmp_path: Path) -> None:
    model = write_byte_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    (model / "config.json").write_text(json.dumps(config))
    assert refused(service, model).endswith(
        "config.json: rope_scaling.rope_type 'dynamic' is not supported"
    )


@pytest.mark.parametrize("service", REQUIRED)
def test_a_model_that_is_not_there_is_named_as_the_option(service: str, tmp_path: Path) -> None:
    model = tmp_path / "none"
    assert refused(service, model).endswith(
        f": --model {model}: must be a directory with a config.json (No such file or directory)"
    )


def refused(service: str, model: Path) -> str:
    """The last line of a service that does not start."""
    command = [sys.executable, "-m", f"lorry.{service}", "--model", str(model)]
    done = subprocess.run(
        [*command, "--address", "127.0.0.1:0", *REQUIRED[service]],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]
