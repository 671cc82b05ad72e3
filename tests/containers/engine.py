"""A container engine, docker or podman, and its compose, as commands."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.command import REPO

COMMAND_S = 300.0
# podman asks for more open files and processes than a container in a container may have.
CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""


@dataclass(frozen=True)
class Engine:
    command: str  # docker or podman
    compose: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_podman(self) -> bool:
        return self.command == "podman"

    def run(self, *arguments: str, timeout_s: float = COMMAND_S, check: bool = True) -> str:
        """What ``docker ARGUMENTS`` prints; raises AssertionError with its words if it fails."""
        return self._run([self.command, *arguments], {}, timeout_s, check).stdout

    def logs(self, container: str) -> str:
        done = self._run([self.command, "logs", container], {}, COMMAND_S, check=False)
        return done.stdout + done.stderr

    def run_compose(self, *arguments: str, variables: Mapping[str, str], check: bool = True) -> str:
        return self._run([*self.compose, *arguments], variables, COMMAND_S, check).stdout

    def _run(
        self, command: list[str], variables: Mapping[str, str], timeout_s: float, check: bool
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=REPO,
            env={**os.environ, **self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done


def find_engine(directory: Path) -> Engine:
    """Docker if its daemon answers, else podman, with its settings in `directory`."""
    if _succeeds("docker", "info") and _succeeds("docker", "compose", "version"):
        return Engine("docker", ["docker", "compose"])
    assert shutil.which("podman"), "make test-system needs docker with compose, or podman"
    settings = directory / "containers.conf"
    settings.write_text(CONTAINERS_CONF)
    # The format of OCI has no health checks.
    environment = {"CONTAINERS_CONF": str(settings), "BUILDAH_FORMAT": "docker"}
    return Engine("podman", ["podman-compose"], environment)


def _succeeds(*command: str) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
