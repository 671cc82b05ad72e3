"""How a worker ends whose engine cannot go on: one line says what happened and what to do."""

import asyncio
import contextlib
import json
import os
import re
import signal

import grpc.aio
import pytest
import torch
from safetensors.numpy import load_file

from lorry.kernels.page_layout import MODULES, Dtype, PageLayout
from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import WorkerLost
from lorry.worker.engine_faults import explain
from lorry.worker.exits import describe_exit
from tests.support.attached_router import attached_router, until_ready
from tests.support.image_store import ImageStore, serving_images
from tests.support.models import make_adapter, make_llama
from tests.support.worker_process import worker_process

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might ..."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("model"))


@contextlib.asynccontextmanager
async def attached_worker(model, *options):
    with worker_process(model, "--threads=1", *options, module="lorry.worker") as worker:
        async with grpc.aio.insecure_channel(worker.address) as channel:
            await until_ready(channel)
            async with attached_router(channel, "router") as router:
                yield worker, router


async def end_of(worker):
    """Exit code and log."""
    return await asyncio.to_thread(worker.wait), "".join(worker.log)


def errors(log):
    return re.findall(r"ERROR \S+: (.*)", log)


async def test_a_pool_beyond_the_machines_memory_is_named(model):
    with worker_process(model, f"--pool-bytes={1 << 50}", module="lorry.worker") as worker:
        code, log = await end_of(worker)
    assert code == 1
    (error,) = errors(log)
    assert error.startswith("the engine failed: the machine is out of memory; lower pool_bytes")
    assert "Traceback" not in log


async def test_a_model_directory_without_weights_is_named(model, tmp_path):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with worker_process(tmp_path, module="lorry.worker") as worker:
        code, log = await end_of(worker)
    assert code == 1
    (error,) = errors(log)
    assert "no .safetensors file" in error
    assert "Traceback" not in log


async def test_an_image_file_that_became_shorter_ends_the_worker(model, tmp_path):
    """The store never does this; who reads a mapping beyond the end of its file is killed."""
    base_model = read_base_model(model)
    store = ImageStore(base_model, tmp_path)
    first, second = (
        store.add(
            json.loads((adapter / "adapter_config.json").read_text()),
            load_file(adapter / "adapter_model.safetensors"),
        )
        for adapter in (
            make_adapter(tmp_path / name, model, seed=1, r=16, target_modules="all-linear")
            for name in "ab"
        )
    )
    layout = PageLayout(geometry=base_model.geometry, dtype=Dtype.FP32)
    room_for_one = layout.pages(MODULES, 16) + 4
    async with serving_images(store) as address:
        options = [f"--store={address}", f"--shm-dir={tmp_path}", f"--pool-pages={room_for_one}"]
        async with attached_worker(model, *options) as (worker, router):
            for version in (first, second):  # the second takes the place of the first
                await router.generate([5, 6, 7], version=version)
            os.truncate(tmp_path / first.hex(), 0)
            await router.submit([5, 6, 7], version=first)
            assert isinstance(await router.until_ended(), WorkerLost)
            code, log = await end_of(worker)
    assert code == 1
    assert "Fatal Python error: Bus error" in log
    assert "(Bus error, as when shared memory is full, or a mapped file became shorter)" in log


async def test_a_defect_is_logged_once_with_its_traceback(model):
    with worker_process(
        model, module="tests.support.faulty_worker", FAULTY_WORKER="defect"
    ) as worker:
        code, log = await end_of(worker)
    assert code == 1
    assert log.count("Traceback") == 1
    assert errors(log)[-1] == "the engine failed: ZeroDivisionError: a defect"


def test_a_full_gpu_is_told_from_a_kernel_that_failed():
    out_of_memory = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert out_of_memory is not None
    assert "out of memory; lower memory_fraction" in out_of_memory
    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ):
        assert "lower memory_fraction" in str(explain(RuntimeError(text)))
    for error in (torch.AcceleratorError(ILLEGAL), RuntimeError(f"Triton Error [CUDA]: {ILLEGAL}")):
        explained = str(explain(error))
        assert "the GPU failed" in explained
        assert "\n" not in explained
    assert explain(RuntimeError("shapes do not match")) is None


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (7, "exit code 7"),
        (-signal.SIGKILL, "exit code -9 (Killed, as when the machine is out of memory)"),
        (-signal.SIGSEGV, "exit code -11 (Segmentation fault)"),
        (-(signal.SIGRTMIN + 1), "exit code -35 (Real-time signal 1)"),
    ],
)
def test_an_exit_code_is_told_in_words(code, text):
    assert describe_exit(code) == text
