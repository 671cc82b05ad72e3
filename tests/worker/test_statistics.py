"""The distributions that the engine reports of its steps and of the adapters that it loads."""

from pathlib import Path

import msgspec
import pytest

from lorry.worker import messages as m
from tests.support.engines import EngineHarness
from tests.support.models import make_adapter, make_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), model, seed=1, r=8)


def serve(harness: EngineHarness, adapter: Path) -> None:
    harness.submit([5, 6], adapter, max_tokens=2)
    harness.run()


def loads(harness: EngineHarness) -> dict[str, int]:
    seconds = harness.engine.status().loads.seconds
    return {source: histogram.count for source, histogram in seconds.items()}


def test_an_adapter_is_loaded_from_where_it_was_fetched_and_then_from_the_host(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness = EngineHarness(model, tmp_path)
    version = harness.version_of(adapter)
    serve(harness, adapter)
    assert loads(harness) == {"shm": 1, "chunks": 0, "host": 0}
    residency = harness.engine.scheduler.residency
    kept = residency.find(version)
    assert kept is not None
    residency.evict(kept)
    serve(harness, adapter)
    assert loads(harness) == {"shm": 1, "chunks": 0, "host": 1}
    image_bytes = harness.image(version).image_bytes
    num_bytes = harness.engine.status().loads.num_bytes
    assert num_bytes == {"shm": image_bytes, "chunks": 0, "host": image_bytes}

    harness.engine.handle([m.EvictAdapter(1, version)])  # the image goes too
    serve(harness, adapter)
    assert loads(harness) == {"shm": 2, "chunks": 0, "host": 1}


def test_a_copied_image_is_loaded_from_chunks(model: Path, adapter: Path, tmp_path: Path) -> None:
    harness = EngineHarness(model, tmp_path)
    version = harness.version_of(adapter)
    harness.engine.handle([m.Prefetch([version])])
    harness.engine.step()
    image = msgspec.structs.replace(harness.image(version), copied=True)
    harness.engine.handle([image])
    serve(harness, adapter)
    assert loads(harness) == {"shm": 0, "chunks": 1, "host": 0}


def test_steps_are_counted_by_kind_and_size(model: Path, adapter: Path, tmp_path: Path) -> None:
    harness = EngineHarness(model, tmp_path)
    for chosen in (None, None, adapter):
        harness.submit([5] * 20, chosen, max_tokens=5, stop_token_ids=[])
    harness.run()
    status = harness.engine.status()
    steps = status.step_statistics
    kinds = {kind: histogram.count for kind, histogram in steps.seconds.items()}
    assert sum(kinds.values()) == status.steps == status.eager_steps
    assert kinds["mixed"] > 0
    assert kinds["decode"] > 0
    assert steps.rows.total == 3 * 20 + 3 * 4
    assert steps.sequences.total == 3 * 5
    assert steps.adapters.total == 5
    assert status.graph_replays == status.padded_rows == 0


def test_a_status_is_of_its_moment_and_survives_the_ring(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    harness = EngineHarness(model, tmp_path)
    serve(harness, adapter)
    status, codec = harness.engine.status(), m.Codec()
    sent = codec.encode([status])
    serve(harness, adapter)
    assert codec.decode_events(sent) == [status]
    assert harness.engine.status() != status
    assert len(sent) < 8192, "it is sent every second"
