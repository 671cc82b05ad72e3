from collections import Counter
from typing import Any

import pytest

from lorry.router.placement import ResidencyPlacement
from lorry.router.worker import Worker
from tests.support.router_requests import request, worker


def busy(load: int, **fields: Any) -> Worker:
    built = worker(**fields)
    for _ in range(load):
        built.add(request())
    return built


def test_placement_prefers_gpu_then_host_then_the_idlest() -> None:
    placement = ResidencyPlacement(imbalance=10)
    on_gpu = busy(3, name="gpu", gpu={b"v"})
    on_host = busy(2, name="host", host={b"v"})
    absent, idle = busy(1, name="absent"), busy(0, name="idle")
    workers = [idle, absent, on_host, on_gpu]
    asked = request(version=b"v")
    assert placement.place(asked, workers) is on_gpu
    assert placement.place(asked, workers[:3]) is on_host
    assert placement.place(asked, workers[:2]) is idle


def test_the_base_model_goes_to_the_idlest() -> None:
    workers: list[Worker] = [busy(2, name="a", gpu={b"v"}), busy(1, name="b")]
    assert ResidencyPlacement(imbalance=10).place(request(), workers) is workers[1]


def test_residency_does_not_outweigh_a_large_imbalance() -> None:
    holder, idle = busy(3, name="holder", gpu={b"v"}), busy(0, name="idle")
    asked = request(version=b"v")
    assert ResidencyPlacement(imbalance=2).place(asked, [holder, idle]) is idle
    assert ResidencyPlacement(imbalance=3).place(asked, [holder, idle]) is holder


def test_no_worker_no_placement() -> None:
    assert ResidencyPlacement(imbalance=2).place(request(), []) is None


def served(workers: list[Worker], version: bytes, num_requests: int) -> list[int]:
    """How many of the requests each worker got, placed one after another."""
    placement = ResidencyPlacement(imbalance=4)
    for _ in range(num_requests):
        asked = request(version=version)
        chosen = placement.place(asked, workers)
        assert chosen is not None
        chosen.add(asked)
    return [worker.num_requests[version] for worker in workers]


def test_requests_of_one_cold_adapter_go_together() -> None:
    workers = [worker(name) for name in ("w1", "w2", "w3")]
    assert sorted(served(workers, b"v", 4)) == [0, 0, 4]


def test_a_hot_adapter_takes_as_many_workers_as_it_needs() -> None:
    workers = [worker(name) for name in ("w1", "w2", "w3")]
    assert sorted(served(workers, b"v", 6)) == [0, 1, 5]
    assert sorted(served(workers, b"v", 94)) == pytest.approx([33, 33, 33], abs=5)


def test_a_cold_adapter_does_not_join_a_busy_worker() -> None:
    workers = [busy(5, name="w1"), worker("w2")]
    assert served(workers, b"v", 3) == [0, 3]


def test_idle_workers_share_many_adapters() -> None:
    workers = [worker(name) for name in ("w1", "w2", "w3", "w4")]
    placement = ResidencyPlacement(imbalance=4)
    placed = Counter[str]()
    for number in range(400):
        chosen = placement.place(request(version=number.to_bytes(32, "big")), workers)
        assert chosen is not None
        placed[chosen.name] += 1
    assert len(placed) == 4
    assert min(placed.values()) > 50


def test_a_quarter_more_than_a_large_load_is_no_imbalance() -> None:
    placement, asked = ResidencyPlacement(imbalance=4), request(version=b"v")
    holder, other = busy(25, name="holder", gpu={b"v"}), busy(20, name="other")
    assert placement.place(asked, [holder, other]) is holder
    holder.add(request())
    assert placement.place(asked, [holder, other]) is other
