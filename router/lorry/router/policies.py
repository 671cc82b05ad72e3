"""What to send next, and where: one small class for each policy, without I/O and clock.

They compose: `fairness` says whose turn it is, `reserve` what is kept for the modest, `order` which
of a tenant's requests goes, `placement` which worker gets it, `clustering` who of that worker's
adapters goes first, `tpot` which workers keep tokens coming in time, and `admission` who need not
wait any longer. Each can be switched off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorry.router.admission import Admission, AdmitAll, EarlyAbort, SloraAbort
from lorry.router.clustering import AdapterClustering, Clustering, NoClustering
from lorry.router.fairness import Fairness, NoFairness, TokenCounters
from lorry.router.order import ArrivalOrder, DeadlineOrder, NewestOrder, Order, SparingOrder
from lorry.router.placement import Pacing, Placement, ResidencyPlacement
from lorry.router.policy_options import OrderName, PolicyOptions
from lorry.router.predictor import Predictor
from lorry.router.reserve import NoReserve, Reserve, ShareReserve
from lorry.router.tpot import TpotPolicy

ORDERS: Mapping[OrderName, Callable[[], Order]] = {
    "arrival": ArrivalOrder,
    "newest": NewestOrder,
    "deadline": DeadlineOrder,
    "sparing": SparingOrder,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    order: Order
    overload_order: Order
    fairness: Fairness
    reserve: Reserve
    clustering: Clustering
    placement: Placement
    pacing: Pacing
    tpot: TpotPolicy
    admission: Admission
    predictor: Predictor


def make_policies(
    options: PolicyOptions, *, weight: Callable[[str], float] = lambda tenant: 1.0
) -> Policies:
    """Those that `options` name; `weight` is a tenant's share of service."""
    predictor = Predictor()
    return Policies(
        order=ORDERS[options.order](),
        overload_order=ORDERS[options.overload_order](),
        fairness=_fairness(options, weight),
        reserve=_reserve(options, weight),
        clustering=_clustering(options),
        placement=ResidencyPlacement(imbalance=options.placement_imbalance),
        pacing=Pacing(predictor, backlog_s=options.worker_backlog_s),
        tpot=TpotPolicy(
            predictor,
            share=options.tpot_share if options.admission == "early-abort" else 0.0,
        ),
        admission=_admission(options),
        predictor=predictor,
    )


def _admission(options: PolicyOptions) -> Admission:
    if options.admission == "early-abort":
        return EarlyAbort(refuse=options.overload_order == "arrival")
    return SloraAbort() if options.admission == "slora" else AdmitAll()


def _fairness(options: PolicyOptions, weight: Callable[[str], float]) -> Fairness:
    if options.fairness == "none":
        return NoFairness()
    return TokenCounters(
        weight=weight,
        by_adapter=options.fairness == "adapters",
        quantum_tokens=options.fairness_quantum_tokens,
    )


def _reserve(options: PolicyOptions, weight: Callable[[str], float]) -> Reserve:
    if options.fairness == "none" or not options.fairness_reserve:
        return NoReserve()
    return ShareReserve(
        kept=options.fairness_reserve,
        step_share=options.fairness_step_share,
        max_lead_tokens=options.fairness_quantum_tokens,
        weight=weight,
    )


def _clustering(options: PolicyOptions) -> Clustering:
    if not options.cluster_adapters:
        return NoClustering()
    return AdapterClustering(
        max_adapters=options.cluster_adapters, max_wait_s=options.cluster_wait_s
    )
