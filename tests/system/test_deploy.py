"""What can be checked of the images and of docker-compose.yml without a container engine."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lorry.client import Client, Request
from lorry.rpc.channel import Credentials
from lorry.rpc.errors import PermissionDenied, Unauthenticated
from tests.support.command import REPO, child_environment
from tests.support.deployment import COMPOSE_FILE, make_secrets
from tests.support.processes import ready

COMPOSE: Mapping[str, Any] = YAML(typ="safe").load(COMPOSE_FILE)
ALL: Mapping[str, Any] = COMPOSE["services"]
SERVICES = {name: service for name, service in ALL.items() if "build" in service}
ADAPTER = REPO / "demo" / "adapters" / "reverse"


def package_of(service: str) -> str:
    return "lorry." + service.replace("-", "_")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deploy") / "secrets"
    make_secrets(directory)
    return directory


def test_every_secret_is_one_that_is_made(secrets: Path) -> None:
    mounted = re.findall(r"/deploy/secrets}/([a-z-]+):", COMPOSE_FILE.read_text())
    assert set(mounted) == {*SERVICES, "callers", "prometheus"}
    assert all((secrets / name).is_dir() for name in mounted)


def test_only_the_demo_is_without_credentials() -> None:
    assert "insecure" not in str(COMPOSE).lower()
    assert "--insecure" in (REPO / "docker-compose.cpu.yml").read_text()


@pytest.mark.parametrize("name", ALL)
def test_a_service_runs_with_no_more_than_it_needs(name: str) -> None:
    service = ALL[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "privileged" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_not_of_root_and_asks_for_its_readiness(name: str) -> None:
    lines = (REPO / SERVICES[name]["build"]["dockerfile"]).read_text().splitlines()
    port = SERVICES[name]["environment"][f"{variable_prefix(name)}ADDRESS"].rpartition(":")[2]
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert "USER 10001:10001" in lines
    assert f"EXPOSE {port}" in lines
    health = f"127.0.0.1:{int(port) + 2000}"
    assert f"ENV {variable_prefix(name)}HEALTH_ADDRESS={health}" in lines
    probe = f'CMD ["python", "-m", "lorry.rpc.health", "--address", "{health}"]'
    assert probe in [line.strip() for line in lines]
    assert lines[-1] == f'ENTRYPOINT ["python", "-m", "{package_of(name)}"]'
    assert any(f"requirements.py {name} " in line for line in lines)


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_makes_its_user_and_declares_its_variables(name: str) -> None:
    text = (REPO / SERVICES[name]["build"]["dockerfile"]).read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line[:1] not in ("", "#")]
    steps = [tuple(line.split(maxsplit=1)) for line in lines]
    runs = " ".join(argument for instruction, argument in steps if instruction == "RUN")
    assert "useradd --uid 10001" in runs
    assert not re.search(r"\\|\b(ARG|RUN)\b", runs), "a line has lost its end"
    declared = {argument.split("=")[0] for step, argument in steps if step in ("ARG", "ENV")}
    assert set(re.findall(r"\$(\w+)", text)) <= declared


def test_the_images_are_built_from_everything_that_the_distribution_needs() -> None:
    let_through = {
        line.removeprefix("!")
        for line in (REPO / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    roots = {"adapter_store", "client", "kernels", "proto", "router", "worker"}
    files = {"README.md", "pyproject.toml", "constraints-cpu.txt", "deploy/requirements.py"}
    assert roots | files <= let_through


def test_prometheus_scrapes_every_service_where_it_listens() -> None:
    jobs = YAML(typ="safe").load(REPO / "deploy" / "prometheus.yml")["scrape_configs"]
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    ports = {
        name: service["environment"][f"{variable_prefix(name)}METRICS_ADDRESS"].rpartition(":")[2]
        for name, service in SERVICES.items()
    }
    assert scraped == {name: [f"{name}:{port}"] for name, port in ports.items()}
    mounted = ALL["prometheus"]["volumes"][0]
    assert mounted == "./deploy/prometheus.yml:/etc/prometheus/prometheus.yml:ro"


def variable_prefix(name: str) -> str:
    return f"LORRY_{name.upper().replace('-', '_')}_"


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_is_an_option_of_its_service(name: str) -> None:
    helped = subprocess.run(
        [sys.executable, "-m", package_of(name), "--help"],
        env=child_environment(COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    variables = [each for each in SERVICES[name]["environment"] if each.startswith("LORRY_")]
    assert variables
    for variable in variables:
        assert variable.startswith(variable_prefix(name))
        assert f"{variable}]" in helped.stdout.replace(",", "]")


@contextmanager
def running(name: str, replacements: Mapping[str, str]) -> Iterator[str]:
    """The service with the variables of its container, but for where things are."""
    variables = {key: str(value) for key, value in SERVICES[name]["environment"].items()}
    command = " ".join(SERVICES[name]["command"])
    for old, new in sorted(replacements.items(), reverse=True):  # longer names first
        variables = {key: value.replace(old, new) for key, value in variables.items()}
        command = command.replace(old, new)
    addresses = ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
    process = subprocess.Popen(
        [sys.executable, "-m", package_of(name), *addresses, *command.split()],
        env=child_environment(**variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=60)


async def test_the_services_work_together_as_configured(secrets: Path, tmp_path: Path) -> None:
    replacements = {
        "/run/secrets": str(secrets),
        "/model": str(REPO / "demo" / "model"),
        "/var/lib/lorry": str(tmp_path),
        "/run/lorry/images": str(tmp_path / "images"),
        "cuda": "cpu",
        "${LORRY_MEMORY_FRACTION:-0.9}": "0.5",
        "/var/cache/lorry": str(tmp_path / "kernels"),
    }
    with ExitStack() as services:

        def start(name: str) -> str:
            return services.enter_context(running(name, replacements))

        store = replacements["adapter-store:50052"] = start("adapter-store")
        replacements["dns:///worker:50053"] = start("worker")
        router = start("router")
        request = Request(prompt="banana>", adapter="reverse", temperature=0, max_tokens=16)
        async with (
            Client(router=router, store=store, tls=secrets / "admin") as operator,
            Client(router=router, store=store, tls=secrets / "infer") as user,
            Client(router=router, store=store, tls=secrets / "prometheus") as stranger,
        ):
            await operator.adapters.push(ADAPTER)
            await ready(router, Credentials(tls=secrets / "infer"))
            assert (await user.generate(request)).text == "ananab"
            with pytest.raises(PermissionDenied):
                await user.adapters.push(ADAPTER, adapter_id="mine")
            with pytest.raises(Unauthenticated):
                await stranger.generate(request)
