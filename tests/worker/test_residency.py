import itertools

import pytest

from lorry.worker.messages import ImageReady
from lorry.worker.pool import PagePool
from lorry.worker.residency import (
    TRANSITIONS,
    Adapter,
    AdapterState,
    IllegalTransition,
    Residency,
)


def image(version: bytes, pages: int = 2) -> ImageReady:
    return ImageReady(version, "/nowhere", 0, 0, pages, 8, [])


def resident(residency: Residency, version: bytes) -> Adapter:
    adapter = residency.begin_fetch(version)
    residency.finish_fetch(adapter, image(version))
    residency.begin_load(adapter)
    residency.finish_load(adapter, now_s=1.0)
    return adapter


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(AdapterState, AdapterState)), ids=lambda s: s.name
)
def test_only_listed_transitions_are_legal(source: AdapterState, target: AdapterState) -> None:
    adapter = Adapter(b"v", state=source)
    if target in TRANSITIONS[source]:
        adapter.move_to(target)
        assert adapter.state is target
    else:
        with pytest.raises(IllegalTransition, match=f"{source.name} -> {target.name}"):
            adapter.move_to(target)
        assert adapter.state is source


def test_eviction_keeps_the_host_image_and_frees_pages_and_slot() -> None:
    pool = PagePool(10)
    residency = Residency(pool)
    adapter = resident(residency, b"a")
    residency.evict(adapter)
    assert adapter.state is AdapterState.HOST
    assert pool.free == pool.total
    residency.check_integrity()


def test_eviction_without_host_image_forgets_the_adapter() -> None:
    residency = Residency(PagePool(10))
    adapter = resident(residency, b"a")
    residency.drop_image(adapter)
    assert adapter.state is AdapterState.RESIDENT
    residency.evict(adapter)
    assert residency.find(b"a") is None


def test_adapter_in_use_or_pinned_is_not_idle() -> None:
    residency = Residency(PagePool(10))
    used, pinned, idle = (resident(residency, version) for version in (b"a", b"b", b"c"))
    residency.acquire(used)
    residency.set_pinned(pinned, True)
    assert list(residency.spare()) == [idle]
    assert residency.pinned_pages == 2
    with pytest.raises(AssertionError, match="is in use"):
        residency.evict(used)


def test_longest_idle_comes_first() -> None:
    residency = Residency(PagePool(10))
    recent, old = (resident(residency, version) for version in (b"a", b"b"))
    residency.acquire(recent)
    residency.begin_step(3)
    residency.release(recent)
    assert list(residency.spare()) == [old, recent]
    assert [old.last_used_step, recent.last_used_step] == [0, 3]


def test_changes_are_told_once() -> None:
    residency = Residency(PagePool(10))
    adapter = resident(residency, b"a")
    changes = residency.take_changes()
    assert changes is not None
    assert (changes.host_added, changes.gpu_added) == ([b"a"], [b"a"])
    assert residency.take_changes() is None
    residency.evict(adapter)
    changes = residency.take_changes()
    assert changes is not None
    assert changes.gpu_removed == [b"a"]
