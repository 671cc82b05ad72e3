"""The distribution as users install it: the wheel, each extra in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.support.command import REPO

MODEL = REPO / "demo" / "model"
SERVICES = {"router": "router", "adapter-store": "adapter_store", "worker": "worker"}
# Gigabytes to install, and some indexes have only CUDA builds: linked from this environment, as is
# what only torch needs.
LINKED = ["torch", "triton", "fsspec", "mpmath", "networkx", "setuptools", "sympy"]
Make = Callable[[str], "Environment"]


class Environment:
    """A virtual environment outside the repository."""

    def __init__(self, directory: Path) -> None:
        venv.create(directory, with_pip=False)
        self.directory = directory
        self.python = directory / "bin" / "python"

    def install(self, requirement: str) -> None:
        arguments = ["--quiet", "--no-compile", "--constraint", "constraints-cpu.txt", requirement]
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install"]
        subprocess.run([*command, *arguments], cwd=REPO, check=True, timeout=280)

    def link(self, name: str) -> None:
        """Make an installed distribution of the running environment available here too."""
        ours = Path(sysconfig.get_path("purelib"))
        (theirs,) = self.directory.glob("lib/python*/site-packages")
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "bin"}:
            (theirs / top).symlink_to(ours / top)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), *command],
            cwd=self.directory,
            env=self._variables(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.python), *command],
            cwd=self.directory,
            env=self._variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def has(self, module: str) -> bool:
        return self.run("-c", f"import {module}").returncode == 0

    def _variables(self) -> dict[str, str]:
        hidden = ("PYTHON", "LORRY_")
        return {key: value for key, value in os.environ.items() if not key.startswith(hidden)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory)]
    subprocess.run([sys.executable, *command], cwd=REPO, check=True, timeout=120)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def make_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(extra: str) -> Environment:
        environment = Environment(tmp_path_factory.mktemp(extra or "bare"))
        if extra == "worker":
            for name in LINKED:
                environment.link(name)
        environment.install(f"lorry[{extra}] @ {wheel.as_uri()}" if extra else str(wheel))
        return environment

    return make


def test_the_wheel_is_small_and_has_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[1] for name in names if name.startswith("lorry/")}
    assert wheel.stat().st_size < 1_000_000
    assert packages == {"adapter_store", "client", "kernels", "router", "rpc", "v1", "worker"}
    assert all(f"lorry/{package}/py.typed" in names for package in packages)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lorry"}
    assert "lorry/__init__.py" not in names


def test_the_wheel_has_every_proto(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    protos = {f"lorry/v1/{path.name}" for path in (REPO / "proto/lorry/v1").glob("*.proto")}
    assert len(protos) == 8
    assert protos <= set(names)


def test_without_extras_there_is_the_health_command_and_others_name_theirs(
    make_environment: Make,
) -> None:
    bare = make_environment("")
    health = bare.run("-m", "lorry.rpc.health", "--address", "127.0.0.1:1", "--timeout-s", "1")
    assert health.returncode == 1
    assert "127.0.0.1:1 readiness: UNAVAILABLE" in health.stderr
    for extra, package in SERVICES.items():
        refused = bare.run("-m", f"lorry.{package}", "--help")
        assert refused.returncode == 1
        assert f"pip install 'lorry[{extra}]'" in refused.stderr
        assert "Traceback" not in refused.stderr
    refused = bare.run(str(bare.directory / "bin" / "lorry"), "--help")
    assert refused.returncode == 1
    assert "pip install 'lorry[client]'" in refused.stderr


def test_the_client_has_its_command_and_no_torch(make_environment: Make) -> None:
    client = make_environment("client")
    helped = client.run(str(client.directory / "bin" / "lorry"), "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "lorry up --model DIR" in helped.stdout
    assert client.has("lorry.client")
    assert not client.has("torch")


@pytest.mark.parametrize("extra", ["router", "adapter-store"])
def test_a_service_starts_where_no_torch_can_be_imported(
    make_environment: Make, extra: str, tmp_path: Path
) -> None:
    environment = make_environment(extra)
    assert not environment.has("torch")
    options = []
    if extra == "adapter-store":
        shared, data = tmp_path / "shm", tmp_path / "data"
        options = ["--shm-dir", str(shared), "--backend", data.as_uri()]
    starts(environment, SERVICES[extra], *options)


def test_the_worker_starts_with_its_extra(make_environment: Make) -> None:
    starts(make_environment("worker"), "worker", "--store", "127.0.0.1:1", "--threads", "1")


def starts(environment: Environment, package: str, *options: str) -> None:
    """The service says that it listens, is healthy, and ends with 0 on SIGTERM."""
    arguments = ["--model", str(MODEL), "--address", "127.0.0.1:0", *options]
    process = environment.start("-m", f"lorry.{package}", *arguments)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"lorry.{package} listening on "), process.communicate()[1]
        address = line.split()[-1]
        health = environment.run(
            *["-m", "lorry.rpc.health", "--address", address, "--service", "liveness"]
        )
        assert health.returncode == 0, health.stderr
        process.terminate()
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    finally:
        process.kill()
        process.communicate()
