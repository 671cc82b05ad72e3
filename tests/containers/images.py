"""The three images, built from wheels that this machine's pip can get: CPU builds, no index.

And one of Redis.
"""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from deploy.requirements import requirements
from tests.containers.engine import Engine
from tests.support.command import REPO

COMPONENTS = ["router", "adapter-store", "worker"]
TAG = "test-system"
CACHE = REPO / ".cache" / "containers"
DEBIAN, DEBIAN_PYTHON = "bookworm", "3.11"
FOR_ITS_PYTHON = ["async-timeout"]  # redis wants it before 3.11.3
DEBIAN_PACKAGES = ["ca-certificates", "python3", "python3-venv", "redis-server"]
DEFAULT_BASE = "python:3.11.13-slim-bookworm"
REDIS = f"localhost/lorry-redis:{TAG}"
REDIS_CONTEXT = REPO / "tests" / "containers" / "redis"
DOWNLOAD_S = 600.0
BUILD_S = 1500.0


def image_name(component: str) -> str:
    return f"localhost/lorry-{component}:{TAG}"


@contextmanager
def built_images(engine: Engine, base_image: str) -> Iterator[None]:
    """All images while the block runs; the wheels and the base stay in .cache for the next run."""
    base = base_image or make_base(engine)
    wheels = download_wheels()
    try:
        with serving_files(wheels) as url, ThreadPoolExecutor(len(COMPONENTS)) as pool:
            list(pool.map(lambda component: build(engine, component, base, url), COMPONENTS))
        engine.run("build", "--tag", REDIS, f"--build-arg=BASE_IMAGE={base}", str(REDIS_CONTEXT))
        yield
    finally:
        ours = [REDIS, *(image_name(component) for component in COMPONENTS)]
        engine.run("rmi", "--force", *ours, *([] if base_image else [base]), check=False)


def make_base(engine: Engine) -> str:
    """Debian with Python by debootstrap; the registry's image where there is no debootstrap."""
    if not shutil.which("debootstrap"):
        return DEFAULT_BASE
    archive = CACHE / f"{'-'.join([DEBIAN, *DEBIAN_PACKAGES])}.tar"
    name = f"localhost/lorry-base:{TAG}"
    if not archive.exists():
        bootstrap(archive)
    engine.run("import", str(archive), name)
    return name


def bootstrap(archive: Path) -> None:
    root, unfinished = CACHE / DEBIAN, archive.with_suffix(".part")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    include = f"--include={','.join(DEBIAN_PACKAGES)}"
    try:
        call("debootstrap", "--variant=minbase", include, DEBIAN, str(root))
        call("tar", "--create", "--file", str(unfinished), "--directory", str(root), ".")
    finally:
        shutil.rmtree(root)
    unfinished.rename(archive)


def download_wheels() -> Path:
    wheels = CACHE / "wheels"
    wanted = {each for component in COMPONENTS for each in requirements(component)}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(wheels), "--constraint", "constraints-cpu.txt"]
    command += ["--only-binary", ":all:", "--python-version", DEBIAN_PYTHON]
    call(*command, "hatchling", *FOR_ITS_PYTHON, *sorted(wanted))
    return wheels


def call(*command: str) -> None:
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=DOWNLOAD_S)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving_files(directory: Path) -> Iterator[str]:
    """The URL at which builds with the host's network find the files of `directory`."""
    handler = partial(QuietHandler, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def build(engine: Engine, component: str, base: str, wheels_url: str) -> None:
    arguments = {"BASE_IMAGE": base, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels_url}
    command = ["build", "--network", "host", "--tag", image_name(component)]
    command += ["--file", f"deploy/{component}.Dockerfile"]
    command += [f"--build-arg={key}={value}" for key, value in arguments.items()]
    if engine.is_podman:
        command.append("--layers=false")  # a commit for each step would double the time
    engine.run(*command, ".", timeout_s=BUILD_S)
