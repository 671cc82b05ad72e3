"""Random adapters for load tests: real ones in every respect but that they are kept nowhere."""

from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from lorry.adapter_store.backend_url import BackendUrl
from lorry.adapter_store.builder import map_file
from lorry.adapter_store.dummy_backend import DummyAdapters, DummyBackend
from lorry.adapter_store.image import NUMPY_DTYPES
from lorry.adapter_store.weights import check_weights
from lorry.kernels.page_layout import Dtype
from lorry.rpc.errors import FeatureUnsupported, VersionNotFound
from tests.support.adapters import TINY

MODEL = b"m" * 32


@pytest.fixture(scope="module")
def backend() -> DummyBackend:
    adapters = DummyAdapters.parse(urlsplit("dummy:5?ranks=8,4&modules=q_proj,v_proj"))
    return DummyBackend(adapters, TINY, model_digest=MODEL, scratch_dir=None)


def test_the_adapters_have_weights_of_their_own_that_an_upload_would_be_taken_with(
    backend: DummyBackend,
) -> None:
    adapters = backend.load().adapters
    assert [str(adapter.name) for adapter in adapters] == [
        f"tenants/default/adapters/dummy-{n}" for n in range(5)
    ]
    assert [adapter.published_version.max_rank for adapter in adapters] == [8, 4, 8, 4, 8]
    contents = set()
    for adapter in adapters:
        with backend.weights(adapter.published) as (content, path):
            assert path.stat().st_size == adapter.published_version.file_bytes
            dtype = NUMPY_DTYPES[Dtype.BF16]
            checked = check_weights(map_file(path), content.spec, TINY, dtype)
            assert checked.weights_bytes == adapter.published_version.weights_bytes
            contents.add(checked.digest)
        assert not path.exists()
    assert len(contents) == len({adapter.published for adapter in adapters}) == 5


def test_every_life_has_the_same_adapters(backend: DummyBackend) -> None:
    again = DummyBackend(
        DummyAdapters(count=5, ranks=(8, 4), modules=("q_proj", "v_proj")),
        TINY,
        model_digest=MODEL,
        scratch_dir=None,
    )
    assert again.load() == backend.load()
    for adapter in backend.load().adapters:
        with backend.weights(adapter.published) as one, again.weights(adapter.published) as other:
            assert one[0] == other[0]
            assert np.array_equal(np.fromfile(one[1], np.uint8), np.fromfile(other[1], np.uint8))


def test_nothing_can_be_changed_and_nothing_else_is_there(backend: DummyBackend) -> None:
    adapter = backend.load().adapters[0]
    with pytest.raises(FeatureUnsupported, match="cannot be changed"):
        backend.commit(adapter.name, adapter, None)
    with pytest.raises(VersionNotFound), backend.weights(b"x" * 32):
        pass


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("dummy:0", "1 to 1000000 adapters, got 0"),
        ("dummy:5?ranks=0", r"ranks must be in \[1, 256\], got \(0,\)"),
        ("dummy:5?ranks=8,many", "ranks must be whole numbers, got '8,many'"),
        ("dummy:5?ranks", "ranks must be whole numbers, got ''"),
        ("dummy:5?modules=q_proj,mlp", "modules must be of q_proj.*got .*mlp"),
        ("dummy:5?rank=8", "ranks and modules, not rank"),
        ("dummy:many", "backend must be file:///DIRECTORY, redis.* or dummy:COUNT"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackendUrl.parse(url)


def test_it_needs_a_base_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made by a store for its base model"):
        BackendUrl.parse("dummy:5", scratch_dir=tmp_path).open(model_digest=None)
