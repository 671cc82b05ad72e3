"""Store, worker and router as the processes that they are, on a model of random weights."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.building import CONFIGS
from lorry.client.endpoints import Endpoints
from lorry.client.local.process import ServiceProcess
from lorry.client.local.stack import LocalStack, ServiceOptions, StackOptions, local_stack
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.rpc.base_model import BaseModel

NATIVE_DTYPE = {"cpu": Dtype.FP32, "cuda": Dtype.BF16}  # what a worker takes by default
START_S = 300.0
SHM = Path("/dev/shm")
TMPFS_SHARE = 0.9  # of shared memory, that page images may take


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedOptions:
    """What the processes are told beside where they are."""

    model: Path  # a directory with a tokenizer
    device: str
    backend: str  # of the store
    ram_bytes: int  # that the store would like for page images
    store: Sequence[str] = ()
    worker: Sequence[str] = ()
    router: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Served:
    """The running services."""

    endpoints: Endpoints
    stack: LocalStack
    shm_dir: Path

    def log(self, name: str) -> str:
        (service,) = (each for each in self.stack.services if each.name == name)
        return service.log.read_text()

    def cpu_s(self, module: str) -> float:
        """CPU seconds that processes of a module have used."""
        seconds = 0.0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                if module in process.cmdline():
                    seconds += sum(process.cpu_times()[:2])
        return seconds


@contextlib.asynccontextmanager
async def served(options: ServedOptions, directory: Path) -> AsyncIterator[Served]:
    """All three, ready; they and their page images are gone afterwards.

    Raises ServiceFailed, with the end of the log of the service that failed.
    """
    with tempfile.TemporaryDirectory(dir=SHM, prefix="lorry-benchmark-") as shm:
        stack_options = _stack_options(options, Path(shm), directory)
        async with local_stack(stack_options, _say) as stack:
            endpoints = await stack.start(timeout_s=START_S)
            yield Served(endpoints, stack, Path(shm))


def native_layout(model: BaseModel, device: str) -> PageLayout:
    """Of the worker's page images."""
    return PageLayout(geometry=model.geometry, dtype=NATIVE_DTYPE[device])


def _stack_options(options: ServedOptions, shm: Path, logs: Path) -> StackOptions:
    ram_bytes = min(options.ram_bytes, int(TMPFS_SHARE * shutil.disk_usage(SHM).total))
    store = ["--backend", options.backend, "--shm-dir", str(shm), "--ram-bytes", str(ram_bytes)]
    worker = ["--load-format", "dummy", "--device", options.device, "--shm-dir", str(shm)]
    worker += ["--local-dir", str(shm / "copies")]
    return StackOptions(
        model=options.model,
        logs=logs,
        store=ServiceOptions(arguments=[*store, *options.store]),
        worker=ServiceOptions(arguments=[*worker, *options.worker]),
        router=ServiceOptions(arguments=options.router),
    )


def _say(service: ServiceProcess) -> None:
    print(f"{service.name} is {service.state.value}", flush=True)


def tokenized_model(name: str, directory: Path) -> Path:
    """A model of `benchmarks/models`, or a directory, with a tokenizer: if it has none, one whose
    tokens are words."""
    source = CONFIGS / name
    if (source / "tokenizer.json").exists():
        return source
    target = directory / source.name
    shutil.copytree(source, target)
    vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
    _word_tokenizer(vocab_size).save(str(target / "tokenizer.json"))
    return target


def _word_tokenizer(vocab_size: int) -> Tokenizer:
    vocabulary = {f"Ġw{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
