from typing import Any

from lorry.router.policies import ArrivalOrder, ResidencyPlacement
from lorry.router.request import RequestState
from lorry.router.worker import Worker
from tests.support.router_requests import queues, request, worker


def busy(load: int, **fields: Any) -> Worker:
    built = worker(**fields)
    for _ in range(load):
        built.add(request())
    return built


def test_arrival_order_goes_across_adapters() -> None:
    waiting = queues()
    asked = [request(version=version) for version in (b"a", b"b", b"a", b"c", b"b")]
    for each in asked:
        waiting.take_place(each)
        each.move_to(RequestState.QUEUED)
        waiting.add(each)
    assert list(ArrivalOrder().order(waiting)) == asked


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
