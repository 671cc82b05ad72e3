"""The whole worker as it is served: gRPC in front, the real engine behind, a store beside it."""

import contextlib
import json
import random

import grpc.aio
import pytest
from safetensors.numpy import load_file

from lorry.rpc.base_model import read_base_model
from tests.support.attached_router import attached_router, until_ready
from tests.support.image_store import ImageStore, serving_images
from tests.support.models import Reference, first_difference, make_adapter, make_llama
from tests.support.waiting import until
from tests.support.worker_process import worker_process

EOS = 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(directory / "a", model, seed=1, r=4, target_modules=["q_proj", "v_proj"]),
        make_adapter(directory / "b", model, seed=2, r=16, lora_alpha=8, target_modules=TARGETS),
    ]


@contextlib.asynccontextmanager
async def serving_worker(model, adapters, shm_dir, *options):
    """A router on a worker whose store has the adapters; yields it and their versions."""
    store = ImageStore(read_base_model(model), shm_dir)
    versions = [
        store.add(
            json.loads((path / "adapter_config.json").read_text()),
            load_file(path / "adapter_model.safetensors"),
        )
        for path in adapters
    ]
    async with serving_images(store) as address:
        arguments = [f"--store={address}", f"--shm-dir={shm_dir}", "--threads=1", *options]
        with worker_process(model, *arguments, module="lorry.worker") as worker:
            async with grpc.aio.insecure_channel(worker.address) as channel:
                await until_ready(channel)
                async with attached_router(channel, "router") as router:
                    yield router, versions, store


@pytest.mark.parametrize("pool_pages", [2000, 24])
async def test_a_mixed_crowd_gets_the_references_tokens(model, adapters, tmp_path, pool_pages):
    """Also from a pool so small that adapters are evicted and sequences preempted."""
    choose = random.Random(5)
    cases = [
        ([choose.randrange(3, 320) for _ in range(choose.randrange(1, 60))], index % 3)
        for index in range(12)
    ]
    async with serving_worker(
        model, adapters, tmp_path, f"--pool-pages={pool_pages}", "--max-running=16"
    ) as (router, versions, _):
        for prompt, which in cases:
            version = versions[which] if which < 2 else b""
            await router.submit(prompt, version=version, max_tokens=24, stop_token_ids=[EOS])
        await router.until(lambda: len(router.finished) == len(cases))
    reference = Reference(model)
    for seq, (prompt, which) in enumerate(cases, start=1):
        expected = reference.greedy(prompt, adapters[which] if which < 2 else None, 24)
        assert first_difference(expected, router.tokens[seq]) is None, f"request {seq}"


async def test_a_prefetched_adapter_becomes_resident_before_any_request(model, adapters, tmp_path):
    async with serving_worker(model, adapters, tmp_path) as (router, versions, store):
        await router.prefetch(*versions)
        await router.until(
            lambda: {v for r in router.residencies for v in r.gpu_added} == set(versions)
        )
        finished = await router.generate([5, 6, 7], version=versions[0])
        assert finished.adapter_load.ToNanoseconds() == 0
        assert len(store.fetches) == 2


async def test_a_temperature_near_0_draws_the_most_likely_tokens(model, adapters, tmp_path):
    async with serving_worker(model, adapters, tmp_path) as (router, _, _):
        for temperature in (0.0, 1e-7, 1e-38, 1e-45):
            await router.generate([5, 6, 7], sampling={"temperature": temperature, "seed": 3})
        assert all(router.tokens[seq] == router.tokens[1] for seq in (2, 3, 4))


async def test_a_cancelled_crowd_leaves_every_page_free(model, adapters, tmp_path):
    async with serving_worker(model, adapters, tmp_path, "--pool-pages=500") as (
        router,
        versions,
        _,
    ):
        seqs = [
            await router.submit([5, 6, 7], version=versions[0], max_tokens=900) for _ in range(8)
        ]
        await router.until(lambda: bool(router.tokens[1]))
        await router.cancel(*seqs)
        await router.until(lambda: len(router.finished) == 8)
        await router.until(lambda: router.last_status.running + router.last_status.waiting == 0)
        status = router.last_status
        assert status.pages_kv == 0
        unused = status.pages_free + status.pages_cached
        assert unused + status.pages_adapter == status.pages_total == 500
        assert status.pages_adapter_idle == status.pages_adapter


async def test_a_prompt_that_came_before_is_taken_from_the_prefix_cache(model, adapters, tmp_path):
    prompt = [5 + place % 50 for place in range(40)]
    async with serving_worker(model, adapters, tmp_path) as (router, versions, _):
        cached = [
            (await router.generate(prompt, version=version)).usage.cached_tokens
            for version in (versions[0], versions[1], versions[0])
        ]
        assert cached == [0, 0, 32]
        assert router.tokens[3] == router.tokens[1]
        await router.until(lambda: router.last_status.prefix_hit_tokens == 32)
        assert router.last_status.prefix_query_tokens == 120
        assert router.last_status.pages_cached > 0


async def test_the_prefix_cache_can_be_switched_off(model, adapters, tmp_path):
    async with serving_worker(model, adapters, tmp_path, "--no-prefix-cache") as (router, *_):
        for _ in range(2):
            finished = await router.generate([5] * 40)
            assert finished.usage.cached_tokens == 0


async def test_the_stores_memory_is_given_back_and_the_adapter_still_answers(
    model, adapters, tmp_path
):
    async with serving_worker(model, adapters, tmp_path) as (router, versions, store):
        await router.generate([5, 6, 7], version=versions[1])
        store.reclaim(versions[1])
        await until(lambda: store.leases[versions[1]] == 0)
        await router.generate([5, 6, 7], version=versions[1])
        assert router.tokens[1] == router.tokens[2]
