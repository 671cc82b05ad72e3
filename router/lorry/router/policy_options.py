"""Which policies a router uses."""

from dataclasses import dataclass
from typing import Literal

from lorry.rpc.command import check_not_negative, check_positive

OrderName = Literal["arrival", "newest", "deadline", "sparing"]
AdmissionName = Literal["all", "early-abort", "slora"]
FairnessName = Literal["none", "tenants", "adapters"]


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """A part of the router's `Config`."""

    order: OrderName = "deadline"
    """Which of the requests whose turn it is goes first: the one that came first or last, or whose
    time to first token runs out first, or that came late and is small."""

    overload_order: OrderName = "sparing"
    """The same while more waits than can be served in time."""

    admission: AdmissionName = "early-abort"
    """Whether requests are aborted that cannot have their first token in time any more, and by
    which rule: by what is predicted, or by S-LoRA's constants, to compare with."""

    tpot_share: float = 0.9
    """Share of a time per output token that a request asks for up to which its worker is filled;
    the rest is left for what steps vary. 0, and with another admission than early-abort: such
    objectives are counted, but decide nothing."""

    fairness: FairnessName = "adapters"
    """Whether the least served tenant is next, and the least served adapter of it."""

    fairness_quantum_tokens: int = 4096
    """Tokens of service by which a tenant's adapters may differ and count as equally served, and
    by which tenants may get ahead in what is kept for them."""

    fairness_reserve: float = 1 / 16
    """Share of a worker's places and memory that is kept from tenants with more than their fair
    share, while others are about; 0: nothing is."""

    fairness_step_share: float = 0.4
    """Share of a worker's next step, of what running requests leave of it, from which on prompts of
    such tenants wait here, so that others' get into that step."""

    cluster_adapters: int = 8
    """Adapters of one worker from which on requests of others that ask for no time to first token
    are passed over while its own have some; 0: no request is ever passed over."""

    cluster_wait_s: float = 1.0
    """Seconds that a request may be passed over, for that or because the worker that holds its
    adapter is busy."""

    worker_backlog_s: float = 0.1
    """Seconds that requests may queue at a worker, at the pace at which it begins them; more wait
    here, where the policies choose among them. 0: as many as the worker takes."""

    placement_imbalance: int = 8
    """Requests by which a worker that holds the adapter may be busier than the idlest one and still
    be preferred."""

    def __post_init__(self) -> None:
        check_positive(self, "fairness_quantum_tokens", "fairness_step_share")
        check_not_negative(
            self,
            "cluster_adapters",
            "cluster_wait_s",
            "worker_backlog_s",
            "placement_imbalance",
            "fairness_reserve",
            "tpot_share",
        )
        if self.tpot_share > 1:
            raise ValueError(f"tpot_share must not exceed 1, got {self.tpot_share}")
        if self.fairness_reserve >= 1:
            raise ValueError(f"fairness_reserve must be below 1, got {self.fairness_reserve}")
