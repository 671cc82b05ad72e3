"""Which policies a router uses."""

from dataclasses import dataclass
from typing import Literal

from lorry.rpc.command import check_not_negative, check_positive

OrderName = Literal["arrival", "newest", "deadline"]
AdmissionName = Literal["all", "early-abort"]
FairnessName = Literal["none", "tenants", "adapters"]


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """A part of the router's `Config`."""

    order: OrderName = "arrival"
    """Which of the requests whose turn it is goes first: the one that came first or last, or whose
    time to first token runs out first."""

    overload_order: OrderName = "arrival"
    """The same while more waits than can be served in time."""

    admission: AdmissionName = "all"
    """Whether requests that cannot keep their SLO any more are aborted."""

    fairness: FairnessName = "none"
    """Whether the least served tenant is next, and the least served adapter of it."""

    fairness_quantum_tokens: int = 1
    """Tokens of service by which tenants or adapters may differ and count as equally served."""

    cluster_adapters: int = 0
    """Adapters of one worker's batch from which on others are passed over; 0: no limit."""

    cluster_wait_s: float = 1.0
    """Seconds that a request may be passed over for that."""

    placement_imbalance: int = 8
    """Requests by which a worker that holds the adapter may be busier than the idlest one and still
    be preferred."""

    def __post_init__(self) -> None:
        check_positive(self, "fairness_quantum_tokens")
        check_not_negative(self, "cluster_adapters", "cluster_wait_s", "placement_imbalance")
