"""Workers as processes, and what of them a test looks at."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.support.command import child_environment

EXIT_TIMEOUT_S = 90


class WorkerProcess:
    """A worker whose log is kept."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self.process = process
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        line = process.stdout.readline()
        prefix = "lorry.worker listening on "
        assert line.startswith(prefix), f"{line!r}; {self.log}"
        self.address = line.removeprefix(prefix).strip()

    @property
    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def wait(self) -> int:
        """The exit code; the bound only guards against hanging."""
        code = self.process.wait(EXIT_TIMEOUT_S)
        self._reader.join()
        return code

    def later_output(self) -> str:
        """What an ended worker has printed after its first line."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log += self.process.stderr


@contextlib.contextmanager
def worker_process(
    model: Path,
    *arguments: str,
    module: str = "tests.support.scripted_worker",
    **environment: str,
) -> Iterator[WorkerProcess]:
    """Start a worker on a free port; by default its engine is the scripted one."""
    command = [sys.executable, "-m", module, "--model", str(model), "--address", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, *arguments],
        env=child_environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        worker = None
        try:
            worker = WorkerProcess(process)
            yield worker
        finally:
            process.kill()
            if worker is not None:
                worker.wait()
