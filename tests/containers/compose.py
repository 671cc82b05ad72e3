"""docker-compose.yml as a running project."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML

from tests.containers.engine import Engine
from tests.containers.images import TAG
from tests.support.command import REPO

PROJECT = "lorry-test-system"
MODEL = REPO / "demo" / "model"


@dataclass(frozen=True)
class Project:
    engine: Engine
    files: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)  # of compose, beside the common ones

    def run(self, *arguments: str, check: bool = True) -> str:
        files = [part for file in self.files for part in ("--file", file)]
        variables = {"LORRY_TAG": TAG, "LORRY_MODEL": str(MODEL), **self.variables}
        return self.engine.run_compose(
            "--project-name", PROJECT, *files, *arguments, variables=variables, check=check
        )

    def container(self, service: str) -> str:
        """Its name: docker joins by hyphens, podman-compose by underscores."""
        joint = "_" if self.engine.is_podman else "-"
        return joint.join([PROJECT, service, "1"])

    def execute(self, service: str, *command: str) -> str:
        return self.engine.run("exec", self.container(service), *command)

    def logs(self) -> str:
        names = self.engine.run("ps", "--all", "--format", "{{.Names}}").split()
        ours = [name for name in names if name.startswith(PROJECT)]
        return "\n".join(f"== {name}\n{self.engine.logs(name)}" for name in ours)


def configuration(project: Project) -> dict[str, Any]:
    """What the project's files come to together."""
    merged: dict[str, Any] = YAML(typ="safe").load(project.run("config"))
    return merged


@contextmanager
def running(project: Project) -> Iterator[Project]:
    """The services while the block runs; containers, volumes and network are gone after it."""
    project.run("down", "--volumes", check=False)  # of a run that was killed
    try:
        project.run("up", "--detach", "--no-build")
        yield project
    except BaseException:
        print(project.logs())
        raise
    finally:
        project.run("down", "--volumes", check=False)
