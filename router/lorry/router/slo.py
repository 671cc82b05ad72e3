"""Service-level objectives: what a request asks for, and what of it it got."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """None asks for nothing."""

    ttft_s: float | None = None  # from arrival to first token
    tpot_s: float | None = None  # (last - first token) / (tokens - 1)

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def over(self, default: "Slo") -> "Slo":
        """This one, with what it leaves open taken from `default`."""
        return Slo(
            ttft_s=default.ttft_s if self.ttft_s is None else self.ttft_s,
            tpot_s=default.tpot_s if self.tpot_s is None else self.tpot_s,
        )

    def is_met(self, ttft_s: float, tpot_s: float) -> bool:
        return (self.ttft_s is None or ttft_s <= self.ttft_s) and (
            self.tpot_s is None or tpot_s <= self.tpot_s
        )

    def satisfaction(self, ttft_s: float) -> float:
        """S-LoRA's reward of a first token: 1 at once, 0 from the objective on."""
        if self.ttft_s is None:
            return 1.0
        return max(0.0, 1.0 - (ttft_s / self.ttft_s) ** 2)


NO_SLO = Slo()
