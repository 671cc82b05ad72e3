"""How many requests kept their objectives, of each tenant and label."""

from collections import Counter, defaultdict
from collections.abc import Collection

from lorry.router.request import Request, RequestState

MAX_LABEL_VALUES = 32
OTHER = "other"  # tenants that the deployment does not name, and label values beyond the limit


class SloCounts:
    """Of requests that asked for something; one that its client gave up counts neither way.

    `tenants` are told apart, and so are the first values of the requests' label `label_key`.
    """

    def __init__(self, tenants: Collection[str] = (), label_key: str = "") -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()  # by tenant, label and outcome
        self.satisfaction: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._tenants = frozenset(tenants)
        self._label_key = label_key
        self._label_values: set[str] = set()

    def end(self, request: Request, state: RequestState) -> None:
        """Count a request by its end, also one that was refused on arrival."""
        if not request.slo or state is RequestState.CANCELLED:
            return
        finished = state is RequestState.FINISHED and request.first_token_s is not None
        self._count(request, *(_kept(request) if finished else (False, 0.0)))

    def _count(self, request: Request, met: bool, satisfaction: float) -> None:
        tenant = request.tenant if request.tenant in self._tenants else OTHER
        label = self._label(request)
        self.requests[tenant, label, "met" if met else "missed"] += 1
        self.satisfaction[tenant, label] += satisfaction

    def _label(self, request: Request) -> str:
        value = request.generation.labels.get(self._label_key, "")
        if value and value not in self._label_values:
            if len(self._label_values) >= MAX_LABEL_VALUES:
                return OTHER
            self._label_values.add(value)
        return value


def _kept(request: Request) -> tuple[bool, float]:
    """Whether a finished request got what it asked for, and its satisfaction."""
    assert request.first_token_s is not None
    ttft_s = request.first_token_s - request.arrival_s
    gaps = max(1, len(request.output_ids) - 1)
    tpot_s = max(0.0, request.last_token_s - request.first_token_s) / gaps
    return request.slo.is_met(ttft_s, tpot_s), request.slo.satisfaction(ttft_s)
