"""Where the services are: what is given, else the `lorry up` that runs here, else the defaults."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lorry.client.client import DEFAULT_ROUTER, DEFAULT_STORE

DEFAULT_WORKER = "127.0.0.1:50053"
STATE_FILE_VARIABLE = "LORRY_STATE_FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoints:
    """Addresses as HOST:PORT; of routers there may be several, separated by commas."""

    router: str = DEFAULT_ROUTER
    store: str = DEFAULT_STORE
    worker: str = DEFAULT_WORKER


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningServices:
    """What `lorry up` writes down for the other commands while its services run."""

    pid: int  # of `lorry up`
    endpoints: Endpoints

    @classmethod
    def read(cls, path: Path) -> "RunningServices | None":
        """None if there is no file, or its process is gone."""
        try:
            content = json.loads(path.read_text())
            running = cls(pid=content["pid"], endpoints=Endpoints(**content["endpoints"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"state file {path} is damaged, delete it: {error!r}") from error
        return running if _is_alive(running.pid) else None

    @contextlib.contextmanager
    def recorded(self, path: Path) -> Iterator[None]:
        """The file exists while the block runs; it appears whole or not at all."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def find_endpoints(
    state_file: Path, *, router: str | None, store: str | None, worker: str | None = None
) -> Endpoints:
    running = RunningServices.read(state_file)
    found = running.endpoints if running else Endpoints()
    return Endpoints(
        router=router or found.router, store=store or found.store, worker=worker or found.worker
    )


def default_state_file(environment: Mapping[str, str] = os.environ) -> Path:
    """`lorry-up.json` in the user's runtime directory, else in the state directory."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    return (Path(runtime) if runtime else state_dir(environment)) / "lorry-up.json"


def state_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Where `lorry up` keeps adapters and logs unless told otherwise."""
    base = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "lorry"


DEFAULT_STATE_FILE = default_state_file()
